"""Every command that is written down parses, and tables say what their files hold."""

import ast
import importlib
import re
import shlex
import shutil
import statistics

import pytest

from common import load_checkpoint, parse_args
from evaluate import PAPER, group_curves, mean_over_run, print_curves, read_log
from helpers import ROOT, SCRIPTS, agrees, call_all, rows, table_line


def test_the_readme_shows_one_picture_under_the_mask_of_each_game(copy):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    (copy / "masks.py").write_text(code + "    print(logits.tolist())\n")
    (copy / "mimics").mkdir()
    shutil.copy(copy / "runs/mimic/mimic.pt", copy / "mimics/mimic-s1.pt")
    (said,) = call_all(copy, ["masks.py"])
    pong, first, boxing, second = said.splitlines()
    assert first == second and pong.startswith("pong ") and boxing.startswith("boxing ")
    scores = ast.literal_eval(first)[0]
    legal = load_checkpoint(copy / "runs/expert-pong/expert.pt", ("expert",))["legal"]
    assert int(pong.split()[1]) == max(legal, key=lambda action: scores[action])
    assert int(boxing.split()[1]) == max(range(18), key=lambda action: scores[action])


@pytest.mark.parametrize(
    "path", ["README.md", "results/README.md", *(f"{name}.py" for name in SCRIPTS)]
)
def test_every_command_that_is_written_down_parses(path):
    text = (ROOT / path).read_text()
    commands = re.findall(
        r'python ((?:train_expert|train_mimic|transfer|evaluate)\.py[^#\n&`;"]*)', text
    )
    assert commands
    for command in commands:
        command = re.sub(r"\$\w+", "1", command)  # a shell's loop variable
        script, *flags = shlex.split(command.rstrip(" |.,)"))
        shipped = "experts/", "mimics/", "results/"
        files = [f for f in flags if f.startswith(shipped) and "*" not in f]
        assert all((ROOT / file).exists() for file in files), command
        parse_args(importlib.import_module(script.removesuffix(".py")).Args, flags)


def test_the_tables_of_the_readme_say_what_the_files_in_results_hold():
    mimics, rest = (ROOT / "README.md").read_text().split("## The files")
    experts = rest.split("\n**2. ")[0]
    table = [row for row in rows(ROOT / "results/mimic.csv") if "mimic-s" in row["network"]]
    for game, (paper_expert, paper_amn) in PAPER.items():
        seeds = [row for row in table if row["game"] == game]
        expert, mean, percent, interval, each, *paper = table_line(mimics, game)
        assert agrees(expert, seeds[0]["expert"]), game
        assert agrees(mean, sum(float(row["mean"]) for row in seeds) / len(seeds)), game
        assert agrees(percent, sum(float(row["% expert"]) for row in seeds) / len(seeds)), game
        for cell, row in zip(each.split(", "), seeds, strict=True):
            assert agrees(cell, row["% expert"]), game
        # The interval is in no file, but in what evaluate.py printed.
        ends = re.search(rf"  {game}: .* interval (.*) to (.*)\)", mimics).groups()
        assert all(map(agrees, interval.split(" to "), ends)), game
        wanted = paper_expert, paper_amn, 100 * paper_amn / paper_expert
        assert len(paper) == 3 and all(map(agrees, paper, wanted)), game
    table = rows(ROOT / "results/experts.csv")
    assert len(table) == len(PAPER)
    for row in table:
        *_, score, paper, percent, sticky = table_line(experts, row["game"])
        assert agrees(score, row["mean"]) and agrees(sticky, row["sticky 0.25"]), row["game"]
        assert agrees(paper, row["paper_dqn"]), row["game"]
        assert agrees(percent, 100 * float(row["mean"]) / float(row["paper_dqn"])), row["game"]


def test_what_the_readmes_say_of_transfer_is_in_its_files(capsys):
    print_curves(group_curves(sorted((ROOT / "results").glob("transfer-*.csv"))))
    number, interval = r"(-?[\d.]+)", r"(?: \(([\d.]+) to ([\d.]+)\))?"
    line = rf"(\w+), .*-(mimic|control).*: {number}{interval} over the run, {number}{interval} at"
    printed = {(game, arm): said for game, arm, *said in re.findall(line, capsys.readouterr().out)}
    table = (ROOT / "README.md").read_text().split("| 400,000 steps |")[1]
    for game in {game for game, _ in printed}:
        seeds, *cells = table_line(table, game)
        assert seeds == ("3" if printed[game, "mimic"][1] else "1")
        for arm, written in (("mimic", cells[::2]), ("control", cells[1::2])):
            written = re.findall(r"[\d.,]+", " ".join(written))
            said = [said for said in printed[game, arm] if said]
            assert len(written) == len(said) and all(map(agrees, written, said)), (game, arm)
    assert len(printed) == 10
    text = (ROOT / "results/README.md").read_text().split("## Transfer")[1].split("\n\n")[2]
    written = [line.split("|")[3:-1] for line in text.split("\n")[2:]]
    starts = {}  # {how the weights begin: {game: row}}
    for row in rows(ROOT / "results/transfer_recipe.csv"):
        starts.setdefault(row["start"], {})[row["game"]] = row
    default = "rescaled, a new last LayerNorm and output layer"
    for start, arm in (("random weights", "control"), (default, "mimic")):
        log = read_log(ROOT / f"results/transfer-breakout-{arm}-s1.csv")
        row, scores = starts[start]["breakout"], log["breakout_score"]
        assert agrees(row["score"], scores[-1]) and float(row["steps"]) == log["step"][-1]
        assert agrees(row["mean_over_run"], mean_over_run(log["step"], scores))
    for by_game, cells in zip(starts.values(), written, strict=True):
        games = "assault", "demon_attack", "breakout"
        for game, over, end in zip(games, cells[::2], cells[1::2], strict=True):
            assert bool(over.strip()) == bool(end.strip()) == (game in by_game)
            if game in by_game:
                assert agrees(over.strip(), by_game[game]["mean_over_run"]), (game, over)
                assert agrees(end.strip(), by_game[game]["score"]), (game, end)


def test_the_table_of_the_last_norm_says_what_its_file_holds():
    text = (ROOT / "results/README.md").read_text().split("### A new last LayerNorm")[1]
    table = text.split("\n### ")[0]
    games = {}  # {game: {whose LayerNorm: rows}}
    for row in rows(ROOT / "results/transfer_last_norm.csv"):
        games.setdefault(row["game"], {}).setdefault(row["last_norm"], []).append(row)
        if row["last_norm"] == "new" and float(row["steps"]) > 200_000:  # those logs are included
            log = read_log(ROOT / f"results/transfer-{row['game']}-mimic-s{row['seed']}.csv")
            scores = log[f"{row['game']}_score"]
            assert agrees(row["mean_over_run"], mean_over_run(log["step"], scores)), row
            assert agrees(row["score"], scores[-1]) and agrees(row["dead"], log["dead"][-1]), row
    for game, norms in games.items():
        steps, seeds, *cells = table_line(table, game)
        kept, new = norms["the mimic's"], norms["new"]
        assert len(kept) == len(new) == int(seeds)
        for row in kept + new:
            assert abs(float(row["steps"]) - float(steps.replace(",", ""))) < 1024
        wanted = []
        for column, scale in (("mean_over_run", 1), ("score", 1), ("dead", 100)):
            for each in (kept, new):
                wanted.append(scale * sum(float(row[column]) for row in each) / len(each))
        assert len(cells) == 6 and all(map(agrees, cells, wanted)), game


def test_the_table_of_the_experts_choices_says_what_its_file_holds():
    text = (ROOT / "results/README.md").read_text().split("### What a choice is worth")[1]
    table, length = text.split("\n### ")[0], "--steps 300_000"
    runs = [row for row in rows(ROOT / "results/expert_recipe.csv") if length in row["flags"]]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:1] == "|"][2:]
    for choice, *scores, dead in lines:
        flags, note = re.search(r"`(.*)`", choice), re.fullmatch(r"\(none, (.*)\)", choice)
        same = f"{length} {flags[1] if flags else ''}".strip(), note[1] if note else ""
        seeds = [row for row in runs if (row["flags"], row["note"]) == same]
        for game, cell in zip(("breakout", "seaquest", "space_invaders"), scores, strict=True):
            own = [row["score"] for row in seeds if row["game"] == game]
            assert all(map(agrees, cell.split(", "), own)) and len(own) == cell.count(",") + 1 == 2
        ends = [100 * extreme(float(row["dead"]) for row in seeds) for extreme in (min, max)]
        assert all(map(agrees, dead.removesuffix(" %").split(" to "), ends)), choice
    assert len(lines) * 6 == len(runs) >= 24


def test_the_table_of_ablations_says_what_its_file_holds():
    text = (ROOT / "results/README.md").read_text()
    table = {}  # {name of the row: {game: rows of its seeds}}
    for row in rows(ROOT / "results/mimic_ablations.csv"):
        if row["network"].startswith("runs/ablation/"):
            name = row["network"].removeprefix("runs/ablation/").rpartition("-s")[0]
            table.setdefault(name, {}).setdefault(row["game"], []).append(row)

    def mean(seeds, column):
        return sum(float(row[column]) for row in seeds) / len(seeds)

    for name, by_game in table.items():
        (line,) = re.findall(rf"^\| {re.escape(name)} \| .*", text, re.M)
        *_, breakout, seaquest, agreement, lost = line.split("|")[:-1]
        cells = zip((breakout, seaquest), agreement.split(", "), lost.split(", "), strict=True)
        for game, (score, agreed, valued) in zip(("breakout", "seaquest"), cells, strict=True):
            seeds = by_game[game]
            assert len(seeds) == 2
            score, percent = re.match(r" ([\d,]+) \((\d+) %, ", score).groups()
            assert agrees(score, mean(seeds, "mean")), (name, game)
            assert agrees(percent, mean(seeds, "% expert")), (name, game)
            assert agrees(agreed, mean(seeds, "% agreement")), (name, game)
            assert agrees(valued, mean(seeds, "% value lost")), (name, game)
    assert len(table) >= 10


def test_the_table_of_other_lengths_says_what_its_files_hold():
    text = (ROOT / "results/README.md").read_text().split("### Other lengths and flags")[1]
    lines = re.findall(r"^\| `--.* \|$", text.split("\n### ")[0], re.M)
    for line in lines:
        percents = {}  # {network: {game: per cent of the expert}}
        for row in rows(ROOT / "results" / re.search(r"\]\((.*?\.csv)\)", line)[1]):
            percents.setdefault(row["network"], {})[row["game"]] = float(row["% expert"])
        seeds = [by_game for by_game in percents.values() if len(by_game) == 8]
        assert len(seeds) == 1 + ("two seeds" in line), line
        means = {game: sum(seed[game] for seed in seeds) / len(seeds) for game in PAPER}
        median, *cells = (cell.removesuffix(" %") for cell in line.strip("| ").split(" | ")[2:6])
        assert agrees(median, statistics.median(means.values())), line
        for game, cell in zip(("breakout", "seaquest", "space_invaders"), cells, strict=True):
            assert agrees(cell, means[game]), (line, game)
    assert len(lines) >= 8


def test_the_table_of_numbers_of_games_says_what_its_file_holds():
    text = (ROOT / "results/README.md").read_text()
    percents = {}  # {number of games: {game: per cent of the expert, of each seed}}
    for row in rows(ROOT / "results/mimic_games.csv"):
        if match := re.match(r"runs/games/(\d)-games?-s\d$", row["network"]):
            by_game = percents.setdefault(int(match[1]), {})
            by_game.setdefault(row["game"], []).append(float(row["% expert"]))
    for count, by_game in percents.items():
        assert len(by_game) == count
        means = {game: sum(seeds) / len(seeds) for game, seeds in by_game.items()}
        (line,) = re.findall(rf"^\| {count} \| (.*) \|$", text, re.M)
        minutes, per_game, *cells, median = [cell.strip() for cell in line.split("|")]
        assert abs(float(minutes) / count - float(per_game)) <= 0.05
        assert agrees(median.split()[0], statistics.median(means.values())), count
        columns = "breakout", "seaquest", "pong", "space_invaders"
        for game, cell in zip(columns, cells, strict=True):
            assert (game in means) == bool(cell), (count, game)
            assert not cell or agrees(cell.split()[0], means[game]), (count, game)
    assert list(percents) == [1, 2, 4, 8]
