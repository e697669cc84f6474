"""What the verbs drive: checks, leases and tracked runs around the rooms below."""
