"""What the stages hand over, through their command lines, on real games at small scale."""

import math

import pytest
import torch

from common import load_checkpoint
from helpers import EXPERT, MIMIC, TRANSFER, outputs, refused, rows, run, same


def test_experts_hand_over_their_weights(studio):
    full, small = (
        load_checkpoint(studio / f"runs/expert-pong/{name}.pt", ("expert",))
        for name in ("checkpoint", "expert")
    )
    assert full["step"] == small["step"] == 320 and full["games"] == ["pong"]
    assert "optimizer" in full and "optimizer" not in small
    for name, weight in full["net"].items():
        assert small["net"][name].dtype == torch.half
        torch.testing.assert_close(small["net"][name].float(), weight, atol=1e-3, rtol=1e-3)
    assert small["command"] and small["machine"] and small["minutes"] > 0
    assert small["legal"] == [0, 1, 3, 4, 11, 12]  # no-op, fire, right, left, and both firing
    log = rows(studio / "runs/expert-pong/log.csv")
    assert [int(row["step"]) for row in log] == [32, 64, 128, 192, 256, 320]
    assert small["max_q"] == pytest.approx(float(log[-1]["max_q"]), rel=1e-4)
    assert float(log[0]["epsilon"]) > float(log[-1]["epsilon"]) and float(log[-1]["lr"]) < float(
        log[0]["lr"]
    )


def test_an_expert_may_play_without_exploring_first(copy):
    run(copy, EXPERT + " --game pong --steps 32 --explore 0 --out runs/calm")
    (row,) = rows(copy / "runs/calm/log.csv")
    assert float(row["epsilon"]) == 0.05


def test_mimic_log_and_checkpoint(studio):
    mimic = load_checkpoint(studio / "runs/mimic", ("mimic",))
    assert mimic["games"] == ["pong", "boxing"] and len(mimic["experts"]) == 2
    assert mimic["regressors"]["0.weight"].shape == (16, 24) and mimic["regressors"][
        "1.weight"
    ].shape == (20, 24)
    small = load_checkpoint(studio / "runs/mimic/mimic.pt", ("mimic",))
    assert small["step"] == mimic["step"] == 320 and small["marks"] == mimic["marks"]
    assert not {"optimizer", "rng", "regressors"} & small.keys()
    for name, weight in mimic["net"].items():
        assert small["net"][name].dtype == torch.half
        torch.testing.assert_close(small["net"][name].float(), weight, atol=1e-3, rtol=1e-3)
    last = rows(studio / "runs/mimic/log.csv")[-1]
    for game in ("pong", "boxing"):
        assert float(last[f"{game}_policy_loss"]) > 0 and float(last[f"{game}_feature_loss"]) > 0
        assert 0 <= float(last[f"{game}_agreement"]) <= 1 and f"{game}_percent" in last


@pytest.mark.parametrize(
    "flags",
    ["--objective q", "--actor expert", "--actor student", "--feature-weight 0", "--temperature 1"],
)
def test_ideas_of_the_mimic_can_be_switched(copy, flags):
    run(copy, MIMIC.replace("--steps 320", "--steps 64") + f" --out runs/other {flags}")
    one, other = (
        load_checkpoint(copy / f"runs/{name}", ("mimic",))["net"] for name in ("mimic", "other")
    )
    assert not same(one, other)


def test_feature_weight_zero_leaves_the_regressors_alone(copy):
    command = MIMIC + " --feature-weight 0 --out runs/"
    run(copy, command.replace("--steps 320", "--steps 32") + "a")
    run(copy, command + "b")
    a, b = (load_checkpoint(copy / f"runs/{name}", ("mimic",)) for name in "ab")
    assert same(a["regressors"], b["regressors"]) and not same(a["net"], b["net"])
    assert math.isnan(float(rows(copy / "runs/b/log.csv")[-1]["pong_feature_loss"]))


def test_transfer_starts_from_the_mimic_and_the_control_does_not(copy):
    frozen = TRANSFER.replace("--steps 320", "--steps 32") + " --lr 1e-12"
    for start in ("mimic", "control", "mimic --keep-head --out runs/kept"):
        run(copy, f"{frozen} --arm {start}")
    scores, features, before = outputs(copy / "runs/mimic")
    kept_scores, kept_features, kept_sizes = outputs(copy / "runs/kept")
    _, _, new_sizes = outputs(copy / "runs/transfer-breakout-mimic-s1")
    _, _, sizes = outputs(copy / "runs/transfer-breakout-control-s1")
    # Layers have the control's size, and yet features and scores may stay the mimic's.
    assert kept_sizes == new_sizes == pytest.approx(sizes, rel=1e-5)
    assert before != pytest.approx(sizes, rel=1e-5)
    assert torch.allclose(kept_scores, scores, atol=1e-3)
    assert torch.allclose(kept_features, features, atol=1e-3)
    # The last LayerNorm and the output layer are the control's, unless they are kept; all before
    # is the mimic's, and the widths are the same.
    new, control, kept = (
        load_checkpoint(copy / f"runs/{name}", ("transfer",))
        for name in ("transfer-breakout-mimic-s1", "transfer-breakout-control-s1", "kept")
    )
    *body, norm, norm_bias, head, head_bias = list(new["net"])
    for name in new["net"]:
        source = kept if name in body else control
        torch.testing.assert_close(new["net"][name], source["net"][name], atol=1e-6, rtol=0)
    for name in (body[0], norm, norm_bias, head, head_bias):
        assert not torch.allclose(kept["net"][name], control["net"][name], atol=1e-3)
    assert new["net_args"] == control["net_args"] == kept["net_args"]


@pytest.mark.parametrize("norm, shifts", [("all", 3), ("none", 0)])
def test_a_mimic_with_other_norms_resumes_and_starts_a_transfer(copy, norm, shifts):
    plain = MIMIC + f" --norm {norm} --out runs/plain"
    run(copy, plain.replace("--steps 320", "--steps 32"))
    run(copy, plain)
    refused(copy, MIMIC + " --out runs/plain", "--norm")
    run(copy, TRANSFER.replace("runs/mimic", "runs/plain"))
    run(copy, "evaluate.py --runs runs/plain --episodes 0 --gif --film 3 --name plain")
    mimic, transfer = (
        load_checkpoint(copy / "runs" / name, (stage,))
        for name, stage in (("plain", "mimic"), ("transfer-breakout-plain-s1", "transfer"))
    )
    assert mimic["net_args"] == transfer["net_args"] and mimic["net_args"]["norm"] == norm
    assert mimic["net"].keys() == transfer["net"].keys()
    # The biases of four layers, and the scale and shift of each LayerNorm.
    assert sum(weight.dim() == 1 for weight in mimic["net"].values()) == 4 + 2 * shifts


def test_transfer_to_a_source_game_is_a_warning(copy):
    assert "warning" in run(copy, TRANSFER.replace("breakout", "pong"))


def test_mimic_bears_an_expert_that_never_scored(copy):
    path = copy / "runs/expert-pong/expert.pt"
    torch.save(load_checkpoint(path, ("expert",)) | {"score": 0.0}, path)
    run(copy, MIMIC + " --steps 64 --out runs/zero")
    assert rows(copy / "runs/zero/log.csv")[-1]["pong_percent"] == "nan"
