"""Commands and links work, tables say what their files hold, and the documents stay short."""

import importlib
import re
import shlex
import shutil
import statistics
from collections import Counter

import pytest
import torch
from torch import nn

import train_mimic
from common import parse_args
from evaluate import PAPER, PUBLISHED, group_curves, mean_over_run, print_curves, read_log
from helpers import ROOT, SCRIPTS, agrees, call_all, rows, table_line

GUIDES = ["README.md", "results/README.md"]
GUIDES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def read(path):
    return (ROOT / path).read_text()


def prose(path):
    """A document without its code, whose comments and calls look like headings and links."""
    return re.sub(r"^```.*?^```$", "", read(path), flags=re.M | re.S)


def section(path, heading):
    """What follows a heading, up to the next one of any level."""
    return re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", prose(path), re.M | re.S)[1]


def table(path, heading, columns):
    """The lines of the table with these first columns, each a list of cells."""
    lines = section(path, heading).split(columns)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```$", read(path), re.M | re.S)


def numbers(text):
    return re.findall(r"-?\d[\d.,]*\d|\d", text)


def all_agree(cells, wanted):
    """As many cells as wanted numbers, and each agrees."""
    wanted = list(wanted)
    return len(cells) == len(wanted) and all(map(agrees, cells, wanted))


def mean(seeds, column):
    return sum(float(row[column]) for row in seeds) / len(seeds)


# Length, links, commands and snippets


@pytest.mark.parametrize("path, words, lines", [("README.md", 1400, 180), (GUIDES[1], 4500, 700)])
def test_a_document_stays_short(path, words, lines):
    text = read(path)
    assert len(text.split()) <= words and len(text.splitlines()) <= lines


def anchors(path):
    """What GitHub makes of the headings: small letters and hyphens, -1 for a second of a name."""
    seen = Counter()
    for heading in re.findall(r"^#+ (.*)$", prose(path), re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        yield f"{name}-{seen[name]}" if seen[name] else name
        seen[name] += 1


@pytest.mark.parametrize("path", GUIDES)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    assert links
    for link in links:
        file, _, anchor = link.partition("#")
        if ":" not in file:  # not on the web
            target = (ROOT / path).parent / file if file else ROOT / path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def written_commands(text):
    """The command lines of the scripts in a text; an xargs line is one for each of its runs."""
    scripts = rf"(?:{'|'.join(SCRIPTS)})\.py"
    extras = r"-m extras\.\w+"
    xargs = rf"printf '%s\\n' (.*?) \| .*xargs .*-L 1 python ({scripts}) (.*)$"
    for lines, script, flags in re.findall(xargs, text, re.M):
        yield from ([script, *flags.split(), *line.split()] for line in shlex.split(lines))
    text = re.sub(xargs, "", text, flags=re.M)
    starts = r"(?:python|torchrun --nproc-per-node \d)"
    for command in re.findall(rf'{starts} ((?:{scripts}|{extras})[^#\n&`;"|]*)', text):
        command = command.removeprefix("-m ")
        yield shlex.split(re.sub(r"\$\w+", "1", command).rstrip(" .,)"))  # $: a shell's variable


EXTRAS = [f"extras/{path.name}" for path in sorted((ROOT / "extras").glob("*.py"))]


@pytest.mark.parametrize("path", [*GUIDES, *(f"{name}.py" for name in SCRIPTS), *EXTRAS])
def test_every_command_that_is_written_down_parses(path):
    commands = list(written_commands(read(path)))
    assert commands or path == "docs/differences.md"
    for script, *flags in commands:
        included = "experts/", "mimics/", "results/"
        files = [flag for flag in flags if flag.startswith(included) and "*" not in flag]
        assert all((ROOT / file).exists() for file in files), flags
        parse_args(importlib.import_module(script.removesuffix(".py")).Args, flags)


def test_the_snippets_of_the_readme_run(copy):
    (copy / "mimics").mkdir()
    shutil.copy(copy / "runs/mimic/mimic.pt", copy / "mimics/mimic-s1.pt")
    blocks = python_blocks("README.md")
    for i, block in enumerate(blocks):
        (copy / f"snippet{i}.py").write_text(block)
    said = call_all(copy, [f"snippet{i}.py" for i in range(len(blocks))])
    assert train_mimic.legal_actions("pong")[int(said[-1])]  # the last one plays


def test_an_expert_of_another_library_becomes_ours(copy):
    layers = []
    for width, out, kernel, stride in ((4, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)):
        layers += [nn.Conv2d(width, out, kernel, stride), nn.ReLU()]
    plain = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 6))
    weights = {f"network.{name}": weight for name, weight in plain.state_dict().items()}
    torch.save(weights, copy / "dqn.pt")
    (block,) = python_blocks("docs/guide.md")
    (copy / "convert.py").write_text(block)
    call_all(copy, ["convert.py"])
    expert, net = train_mimic.load_expert(copy / "experts-mine/pong.pt")
    obs = torch.randint(256, (8, 4, 84, 84), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad():
        q_values, _ = net(obs)
        assert torch.allclose(q_values[:, expert["legal"]], plain(obs / 255), atol=1e-4)


# Tables: stage 1


def test_the_table_of_experts():
    measured = {(row["game"], row["sticky"]): row for row in rows(ROOT / "results/experts.csv")}
    assert len(measured) == 2 * len(PAPER)
    for game in PAPER:
        row, sticky = measured[game, "0"], measured[game, "0.25"]
        log, score = read_log(ROOT / f"results/expert-{game}.csv"), float(row["mean"])
        steps, *cells = table_line(section("results/README.md", "Results"), game)
        wanted = log["minutes"][-1], log[f"{game}_score"][-1]
        wanted += score, 100 * score / float(row["paper_dqn"]), sticky["mean"]
        assert all_agree(cells, wanted), game
        assert 0 <= log["step"][-1] - int(steps.replace(",", "")) < 1024, game


def test_the_table_of_untuned_games():
    lines = table("results/README.md", "Games that nobody tuned for", "| game |")
    for row, (_, trained, *cells) in zip(rows(ROOT / "results/untuned.csv"), lines, strict=True):
        log = read_log(ROOT / f"results/untuned-{row['game']}.csv")
        assert agrees(trained, log[f"{row['game']}_score"][-1]), row
        assert all_agree(cells, (row["mean"], row["% human"], row["dqn_2015"])), row


def test_the_table_of_pong():
    lines = table("results/README.md", "Pong from scratch", "| flags besides")
    names = "pong", "pong-long", "pong-copy", "pong-copy-long"
    for name, (_, steps, trained, *measured) in zip(names, lines, strict=True):
        logs = [read_log(ROOT / f"results/{name}-s{seed}.csv") for seed in (1, 2, 3)]
        assert all(abs(log["step"][-1] - float(steps[:-1]) * 1e6) < 1024 for log in logs)
        assert all_agree(trained.split(", "), (log["pong_score"][-1] for log in logs))
        for cell in measured:
            if cell != "-":
                scores, file = re.fullmatch(r"\[(.*)\]\((.*)\)", cell).groups()
                seeds = [row["mean"] for row in rows(ROOT / "results" / file)]
                assert all_agree(scores.split(", "), seeds), cell


# Tables: stage 2


def test_the_tables_of_the_mimic():
    measured = [row for row in rows(ROOT / "results/mimic.csv") if "mimic-s" in row["network"]]
    front, notebook = section("README.md", "Results"), read("results/README.md")
    notebook, printed = notebook.split("## The mimic")[1].split("```text")[:2]
    percents = []
    for game in PAPER:
        paper_expert, paper_amn = PUBLISHED[game]["paper_dqn"], PUBLISHED[game]["paper_amn"]
        seeds = [row for row in measured if row["game"] == game]
        expert, score, percent, interval, each, *paper = table_line(notebook, game)
        own = seeds[0]["expert"], mean(seeds, "mean"), mean(seeds, "% expert")
        assert all_agree((expert, score, percent), own), game
        assert all_agree(each.split(", "), (row["% expert"] for row in seeds)), game
        # The interval is in no file, but in what evaluate.py printed.
        ours, *ends = re.search(rf"^  {game} (.*) \((.*) to (.*)\)$", printed, re.M).groups()
        assert agrees(ours, own[2]) and all_agree(interval.split(" to "), ends), game
        wanted = paper_expert, paper_amn, 100 * paper_amn / paper_expert
        assert all_agree(paper, wanted) and len(seeds) == 3, game
        assert table_line(front, game) == [expert, score, percent, interval, paper[2]], game
        percents.append(own[2])
    median = re.search(r"% of expert\n  median (\S+)", printed)[1]
    assert agrees(median, statistics.median(percents))


def test_the_table_of_ablations():
    lines = table("results/README.md", "What the paper's ideas are worth", "| row |")
    file = rows(ROOT / "results/mimic_ablations.csv")
    for name, *cells in lines:
        for game, cell in zip(("breakout", "seaquest"), cells, strict=True):
            networks = [f"runs/ablation/{name}-s{seed}" for seed in (1, 2)]
            seeds = [row for row in file if row["network"] in networks and row["game"] == game]
            score, percent = re.match(r"([\d,]+) \((\d+)%, \d+ to \d+\)$", cell).groups()
            assert len(seeds) == 2 and agrees(score, mean(seeds, "mean")), (name, game)
            assert agrees(percent, mean(seeds, "% expert")), (name, game)
    assert 4 * len(lines) == sum(row["network"].startswith("runs/ablation/") for row in file)


def test_the_table_of_numbers_of_games():
    lines = table("results/README.md", "1, 2, 4 and 8 games", "| games |")
    file = rows(ROOT / "results/mimic_games.csv")
    for count, minutes, per_game, *cells, median in lines:
        seeds = [row for row in file if row["network"].startswith(f"runs/games/{count}-game")]
        by_game = {}
        for row in seeds:
            by_game.setdefault(row["game"], []).append(row)
        means = {game: mean(own, "% expert") for game, own in by_game.items()}
        assert len(means) == int(count) == len(seeds) / 2
        assert abs(float(minutes) / int(count) - float(per_game)) <= 0.05
        assert agrees(median.split()[0], statistics.median(means.values())), count
        columns = "breakout", "seaquest", "pong", "space_invaders"
        for game, cell in zip(columns, cells, strict=True):
            assert (game in means) == bool(cell), (count, game)
            assert not cell or agrees(cell.split()[0], means[game]), (count, game)
    assert [line[0] for line in lines] == ["1", "2", "4", "8"]


# Tables: stage 3


def test_the_table_of_transfer_runs(capsys):
    print_curves(group_curves(sorted((ROOT / "results").glob("transfer-*.csv"))))
    number, interval = r"(-?[\d.]+)", r"(?: \(([\d.]+) to ([\d.]+)\))?"
    line = rf"(\w+), .*-(mimic|control).*: {number}{interval} over the run, {number}{interval} at"
    printed = {(game, arm): said for game, arm, *said in re.findall(line, capsys.readouterr().out)}
    text = section("results/README.md", "The transfer runs")
    for (game, arm), said in printed.items():
        seeds, *cells = table_line(text, game)
        assert seeds == ("3" if said[1] else "1"), game
        written = numbers(" ".join(cells[arm == "control" :: 2]))
        assert all_agree(written, filter(None, said)), (game, arm)
    assert len(printed) == 10


def test_the_table_of_first_weights():
    starts = {}  # {how the weights begin: {game: row}}
    for row in rows(ROOT / "results/transfer_recipe.csv"):
        starts.setdefault(row["start"], {})[row["game"]] = row
    default = "rescaled, a new last LayerNorm and output layer"
    for start, arm in (("random weights", "control"), (default, "mimic")):
        log = read_log(ROOT / f"results/transfer-breakout-{arm}-s1.csv")
        row, scores = starts[start]["breakout"], log["breakout_score"]
        assert agrees(row["score"], scores[-1]) and float(row["steps"]) == log["step"][-1]
        assert agrees(row["mean_over_run"], mean_over_run(log["step"], scores))
    text = read("results/README.md").split("## Transfer")[1].split("| the mimic's layers |")[1]
    lines = [line.split("|")[3:-1] for line in text.split("\n\n")[0].splitlines()[2:]]
    for by_game, cells in zip(starts.values(), lines, strict=True):
        for game, cell in zip(("assault", "demon_attack", "breakout"), cells, strict=True):
            row = by_game.get(game)
            wanted = (row["mean_over_run"], row["score"]) if row else ()
            assert all_agree(numbers(cell), wanted), (by_game, cell)


def test_the_table_of_the_last_norm():
    text = section("results/README.md", "A new last LayerNorm")
    games = {}  # {game: {whose LayerNorm: rows}}
    for row in rows(ROOT / "results/transfer_last_norm.csv"):
        games.setdefault(row["game"], {}).setdefault(row["last_norm"], []).append(row)
        if row["last_norm"] == "new" and float(row["steps"]) > 200_000:  # those logs are included
            log = read_log(ROOT / f"results/transfer-{row['game']}-mimic-s{row['seed']}.csv")
            scores = log[f"{row['game']}_score"]
            assert agrees(row["mean_over_run"], mean_over_run(log["step"], scores)), row
            assert agrees(row["score"], scores[-1]) and agrees(row["dead"], log["dead"][-1]), row
    for game, norms in games.items():
        seeds, *cells = table_line(text, game)
        arms = norms["the mimic's"], norms["new"]
        assert len(arms[0]) == len(arms[1]) == int(seeds)
        columns = (("mean_over_run", 1), ("score", 1), ("dead", 100))
        for cell, (column, scale) in zip(cells, columns, strict=True):
            wanted = [scale * mean(arm, column) for arm in arms]  # kept, new
            assert all_agree(cell.split(", "), wanted), (game, column)
