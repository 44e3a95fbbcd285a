"""Checkpoints: damaged, foreign, older, and those that are included."""

import importlib
import math
import os
import pickle

import pytest
import torch

from common import UserError, load_checkpoint, run_name, save_checkpoint
from helpers import MIMIC, ROOT, TRANSFER, contents, refused, run
from train_expert import AtariNet
from train_mimic import load_expert


def test_damaged_and_foreign_checkpoints_are_refused(copy):
    good = (copy / "runs/mimic/checkpoint.pt").read_bytes()
    mimic = load_checkpoint(copy / "runs/mimic", ("mimic",))
    weight = good.index(mimic["net"]["head.weight"].numpy().tobytes()) + 7
    for name, content in (
        ("cut", good[: len(good) // 2]),
        ("empty", b""),
        ("noise", os.urandom(500)),
        ("flipped", good[:2000] + bytes(200) + good[2200:]),
        ("one-bit", good[:weight] + bytes([good[weight] ^ 1]) + good[weight + 1 :]),
    ):
        (copy / f"{name}.pt").write_bytes(content)
        refused(copy, f"evaluate.py --runs {name}.pt", f"{name}.pt")
    torch.save({"net": {}}, copy / "foreign.pt")
    refused(copy, "evaluate.py --runs foreign.pt", "foreign.pt", "not a checkpoint of this project")
    for part in ("net_args", "marks"):
        torch.save({k: v for k, v in mimic.items() if k != part}, copy / "part.pt")
        refused(copy, "evaluate.py --runs part.pt", "part.pt", f"lacks {part}")
    torch.save(mimic | {"args": None}, copy / "part.pt")
    refused(copy, "evaluate.py --runs part.pt", "part.pt", "args")


def test_checkpoint_whose_weights_do_not_fit_is_refused(copy):
    mimic = load_checkpoint(copy / "runs/mimic", ("mimic",))
    mimic["net_args"]["hidden"] = [25]
    torch.save(mimic, copy / "wide.pt")
    for command in ("evaluate.py --runs wide.pt", TRANSFER + " --mimic wide.pt"):
        refused(copy, command, "wide.pt", "widths")


@pytest.mark.parametrize("stage", ["mimic", "expert"])
def test_checkpoint_whose_weights_are_not_finite_is_refused(copy, stage):
    folder = {"mimic": "mimic", "expert": "expert-pong"}[stage]
    spoiled = load_checkpoint(copy / "runs" / folder, (stage,))
    spoiled["net"]["head.bias"][3] = math.nan
    torch.save(spoiled, copy / "spoiled.pt")
    other = TRANSFER + " --mimic spoiled.pt --out runs/no"
    if stage == "expert":
        other = MIMIC.replace("runs/expert-pong/expert.pt", "spoiled.pt") + " --out runs/no"
    for command in ("evaluate.py --runs spoiled.pt", other):
        refused(copy, command, "spoiled.pt", "not finite")


def test_malicious_checkpoint_runs_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    for save in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))):
        save(Bomb(), tmp_path / "bomb.pt")
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / "bomb.pt", ("expert",))
    assert not (tmp_path / "exploded").exists()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    args = importlib.import_module("train_expert").Args()
    save_checkpoint(tmp_path / "c.pt", args, net={"weight": torch.ones(2)})
    good = (tmp_path / "c.pt").read_bytes()
    for weight in (torch.tensor([1.0, torch.nan]), torch.tensor([1e6]).half()):
        with pytest.raises(UserError, match="not finite"):
            save_checkpoint(tmp_path / "c.pt", args, net={"weight": weight})
    assert contents(tmp_path) == {tmp_path / "c.pt": good}


def test_experts_that_ship_are_whole():
    shipped = sorted((ROOT / "experts").glob("*.pt"))
    assert len(shipped) >= 3
    for path in shipped:
        expert = load_checkpoint(path, ("expert",))
        assert expert["games"] == [path.stem] and path.stat().st_size < 4e6
        assert {"command", "step", "minutes", "score", "machine"} <= expert.keys()
        assert all(
            weight.dtype == torch.half and weight.isfinite().all()
            for weight in expert["net"].values()
        )


def test_mimics_that_ship_are_whole_and_know_their_experts():
    shipped = sorted((ROOT / "mimics").glob("mimic-s*.pt"))
    assert shipped
    for path in shipped:
        mimic = load_checkpoint(path, ("mimic",))
        assert path.stat().st_size < 4e6
        assert all(weight.dtype == torch.half for weight in mimic["net"].values())
        experts = [load_checkpoint(ROOT / expert, ("expert",)) for expert in mimic["experts"]]
        assert [expert["games"] for expert in experts] == [[game] for game in mimic["games"]]
        assert [[expert["step"], expert["minutes"]] for expert in experts] == mimic["marks"]


def test_wrong_stage_and_garbage_never_reach_the_network(tmp_path):
    for content in ({"format": "actor-mimic-1", "stage": "mimic"}, ["a list"], torch.zeros(3)):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / "x.pt", ("expert",))


def test_networks_of_the_first_edition_still_load(copy):
    """They say conv_norm, or nothing, of their LayerNorm, and do not name their class."""
    for said, norm in (({"conv_norm": False}, "linear"), ({"conv_norm": True}, "all"), ({}, "all")):
        net = AtariNet((4, 8), (16,), norm)
        old = load_checkpoint(copy / "runs/expert-pong/expert.pt", ("expert",))
        old["net_args"] = {"channels": [4, 8], "hidden": [16], **said}
        del old["network"]
        torch.save(old | {"net": net.state_dict()}, copy / "old.pt")
        expert, loaded = load_expert(copy / "old.pt")
        assert expert["net_args"]["norm"] == norm and expert["network"] == "AtariNet"
        obs = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
        assert torch.equal(loaded(obs)[0], net(obs)[0])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_wrapped_networks_are_dropped(copy, prefix):
    """torch.compile and DistributedDataParallel put them there."""
    path = copy / "runs/expert-pong/expert.pt"
    expert, net = load_expert(path)
    wrapped = {prefix + name: weight for name, weight in expert["net"].items()}
    torch.save(expert | {"net": wrapped}, path)
    _, again = load_expert(path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


def test_a_network_of_stage_3_is_an_expert_too(copy):
    run(copy, TRANSFER)
    experts = "--experts runs/transfer-breakout-mimic-s1 runs/expert-pong/expert.pt"
    run(copy, MIMIC + f" {experts} --out runs/of-both")
    mimic = load_checkpoint(copy / "runs/of-both", ("mimic",))
    assert mimic["games"] == ["breakout", "pong"]


@pytest.mark.parametrize(
    "part, value",
    [
        ("games", []),
        ("games", ["pong", 3]),
        ("step", "x"),
        ("step", -100),
        ("minutes", None),
        ("scores", None),
        ("experts", None),
        ("marks", 7),
    ],
)
def test_checkpoint_with_a_part_of_another_kind_is_refused(copy, part, value):
    mimic = load_checkpoint(copy / "runs/mimic", ("mimic",))
    torch.save(mimic | {part: value}, copy / "odd.pt")
    refused(copy, "evaluate.py --runs odd.pt", "odd.pt is damaged", part)


def test_a_checkpoint_is_named_after_its_run_or_its_file(tmp_path):
    for path in (
        "mimics/amn.pt",
        "runs/amn",
        "runs/amn/mimic.pt",
        "runs/amn/",
        "amn/checkpoint.pt",
    ):
        assert run_name(tmp_path / path) == "amn"
    assert run_name(tmp_path / "amn-0.5") == "amn-0.5"
