#!/bin/sh
# spot-notice.sh HEAD:PORT: waits for Amazon's notice that this instance will be taken away in two minutes, then has Ray
# drain the node: workers make a checkpoint at once and another one 5 s before the deadline, then the run goes on
# elsewhere. On an instance that is not a spot instance it waits until the node ends.
set -eu
address=$1
metadata=${METADATA_URL:-http://169.254.169.254}

# Python, because the image has no curl. Status 0: there is a notice; 1: not yet, or the service does not answer.
noticed() {
    python - "$metadata" <<'EOF'
import sys, urllib.request
base = sys.argv[1] + "/latest/"
ask = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
try:
    request = urllib.request.Request(base + "api/token", method="PUT", headers=ask)
    token = urllib.request.urlopen(request, timeout=2).read().decode()
    carry = {"X-aws-ec2-metadata-token": token}
    urllib.request.urlopen(urllib.request.Request(base + "meta-data/spot/instance-action", headers=carry), timeout=2)
except OSError:
    sys.exit(1)
EOF
}

until noticed; do
    sleep "${POLL_S:-5}"
done
# Less than two minutes: polling and the start of this command take time too.
exec ray drain-node --address="$address" --reason=DRAIN_NODE_REASON_PREEMPTION \
    --reason-message="spot notice" --deadline-remaining-seconds=100
