"""The lines that end `cpcscale pretrain`."""

from cpcscale.report.terminal.pretrain import percentages, pretrain_lines

SUMMARY = {
    "steps": 60,
    "audio_s": 7200.0,
    "audio_s_per_s": 512.4,
    "data_wait_share": 0.0123,
    "time": {"store": 0.0, "decode": 0.0004, "forward": 0.3, "backward": 0.6, "unattributed": 0.0996},
    "hidden": {"store": 0.0, "decode": 0.25},
    "loss": 2.5,
    "accuracy_mean": 0.3,
    "accuracy_chance": 1 / 51,
    "heldout": {"loss": 2.6, "accuracy_mean": 0.2, "accuracy_k01": 0.7, "accuracy_k02": 0.1},
    "checkpoint": "/runs/mine/checkpoints/step-00000060-0001",
    "run_id": "abc",
}


def test_a_finished_run_says_how_fast_it_was_where_the_time_went_and_how_it_scores():
    lines = list(pretrain_lines(SUMMARY))
    assert lines == [
        "pretrained 60 steps on 2.00 h of audio at 512 audio s/s (1.2% waiting for data)",
        "  time           backward 60.0%, forward 30.0%, unattributed 10.0%",
        "  in parallel    decode 25.0%",
        "  InfoNCE accuracy (ties count as wrong; chance 0.0196)",
        "  training batch mean 0.300, loss 2.500",
        "  heldout        mean 0.200, loss 2.600; k=1..2: 0.70 0.10",
        "  checkpoint /runs/mine/checkpoints/step-00000060-0001",
        "  MLflow run abc",
    ]


def test_what_took_next_to_no_time_is_left_out():
    assert percentages({"a": 0.0009, "b": 0.001, "c": 0.5}) == "c 50.0%, b 0.1%"
    quiet = {**SUMMARY, "hidden": {"store": 0.0}}
    assert not any(line.lstrip().startswith("in parallel") for line in pretrain_lines(quiet))
