"""What the documents say is so: their commands and programs run, their links lead somewhere, what they name exists.

A command runs in this process, in a folder where its placeholders (PHOTOS, WEIGHTS, photo.jpg, ...) are files and
folders of these names, with the tiny weights in the place of the default ones, and shipped configs with a tiny model
and steps that change nothing. What takes hardware, minutes or the network is only parsed, by the parser of its entry
point. The tables below say which is which.
"""

import ast
import dataclasses
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from markdown_it import MarkdownIt

from tests.conftest import TINY, TINY_T5, foreign_model, save_random_weights, write_foreign_model
from zipir_jax import benchmark, prepare, weights
from zipir_jax.command_line import load_config, parse
from zipir_jax.config import NEGATIVE_PROMPT, POSITIVE_PROMPT
from zipir_jax.data.latents import write_latents
from zipir_jax.data.text import write_text
from zipir_jax.photograph import write_image
from zipir_jax.training.checkpoint import encoder_digest
from zipir_jax.training.loop import train
from zipir_jax.weights import load_weights

ROOT = Path(__file__).parents[1]
CARD = ROOT / "zipir_jax" / "weights" / "default" / "README.md"
DOCUMENTS = [ROOT / "README.md", ROOT / "launch" / "README.md", CARD, *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "docs" / "python_api.ipynb"

# Commands by what they begin with, `python -m` left out; of several beginnings the longest counts. To those that run,
# with the options that make them small.
RUN = {
    "zipir_jax.app": ("--port", "0"),
    "zipir_jax.benchmark sampling": ("--task", "sr8"),
    "zipir_jax.evaluate": (),
    "zipir_jax.prepare embed": (),
    "zipir_jax.prepare export": (),
    "zipir_jax.prepare import-sd-vae": (),
    "zipir_jax.prepare import-t5": (),
    "zipir_jax.prepare index": (),
    "zipir_jax.prepare latents": (),
    "zipir_jax.prepare preview": (),
    "zipir_jax.prepare statistics": ("--resolution", "64", "--images", "2"),
    "zipir_jax.sample": (),
    "zipir_jax.train": (),
}
PARSED = {
    "zipir_jax.benchmark compile": "needs a compiler for TPUs; tests/measure/test_compile.py runs it",
    "zipir_jax.benchmark latency": "takes minutes; tests/measure/test_latency.py runs it with a tiny model",
    "zipir_jax.train --config configs/dit_3b.py --data.sources DIR --data.text EMBEDDINGS --mesh.data 1": "8 devices",
}
OF_OTHERS = {
    "pip": "would change this environment; its extras are looked up",
    "sbatch": "SLURM; tests/test_launch.py runs the script with stand-ins",
    "scancel": "SLURM",
}
SMALLER = {"2048": "64", "25": "2", "1000": "1", "5000": "1", "10000": "1"}  # so that it takes seconds
WRITTEN = ("--output", "--pictures", "--plot")  # options whose value a command makes
OPTIONS_OF_OTHERS = {"--data.folder", "--logdir", "--shm-size"}  # the first of earlier versions
EXTRA = r"\.\[(\w+)\]"  # in `pip install -e ".[cuda12]"`


# --------------------------------------------------------------------------------------------------
# Reading the documents
# --------------------------------------------------------------------------------------------------


@functools.cache
def tokens(document):
    """All of a document, inline parts as well."""
    parsed = MarkdownIt("commonmark").enable("table").parse(document.read_text())
    return [part for token in parsed for part in (token, *(token.children or ()))]


def blocks(document):
    """(line, language, text) of each block of code; an indented one has no language."""
    for token in tokens(document):
        if token.type in ("fence", "code_block"):
            yield token.map[0] + 1, token.info.strip(), token.content


def named(document, line):
    return f"{document.relative_to(ROOT)}:{line}"


COMMANDS = [
    pytest.param(command, id=f"{named(document, line)}: {command}")
    for document in DOCUMENTS
    for line, language, text in blocks(document)
    if language in ("", "sh")
    for command in text.replace("\\\n", " ").splitlines()
    if command.strip()
]
PROGRAMS = [
    pytest.param(text, id=named(document, line))
    for document in DOCUMENTS
    for line, language, text in blocks(document)
    if language == "python"
]
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)


def code_of(document):
    """What stands in `these` within the text."""
    return [token.content for token in tokens(document) if token.type == "code_inline"]


def words_of(command):
    """A command's words, without comment and without settings of the environment before it."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    return words


def beginning(command, table):
    """The longest of a table's entries that a command begins with, or None."""
    return max((entry for entry in table if f"{command} ".startswith(f"{entry} ")), key=len, default=None)


# --------------------------------------------------------------------------------------------------
# Commands and programs
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="made")
def make_placeholders(tiny_weights, t5_folder, sd_vae_folder, tmp_path_factory):
    """{name in the documents: what stands for it}."""
    folder = tmp_path_factory.mktemp("made")
    write_image(folder / "photos" / "one.png", skimage.data.coffee()[100:124, 200:230])
    write_image(folder / "photos" / "two.jpg", skimage.data.astronaut()[100:130, 200:224])
    write_image(folder / "originals" / "three.png", skimage.data.astronaut()[100:164, 200:264])
    write_image(folder / "collection" / "four.png", skimage.data.astronaut())  # large enough for an index
    hubs = {}
    for kind in ("t5", "sd_vae"):
        config, tensors, _ = foreign_model(kind)
        hubs[kind] = write_foreign_model(folder / f"hub_{kind}", kind, config, tensors)
    dit = dataclasses.replace(TINY.dit, text_width=16)  # channels of the tiny T5
    with_text = save_random_weights(folder / "with_text", dataclasses.replace(TINY, dit=dit))
    embeddings, latents = folder / "embeddings", folder / "latents"
    rng = np.random.default_rng(0)
    captions = ("", POSITIVE_PROMPT, NEGATIVE_PROMPT)
    write_text(embeddings, [(caption, rng.standard_normal((3, 16))) for caption in captions], TINY_T5)
    pairs = rng.standard_normal((2, 2, 2, 2, 64)).astype(np.float32)
    digest = encoder_digest(load_weights(tiny_weights, ())[1])
    write_latents(latents, [(clean, lq, "") for clean, lq in pairs], "random", digest)
    return {
        "photo.jpg": folder / "photos" / "two.jpg",
        "photo.png": folder / "photos" / "one.png",
        "photos": folder / "photos",
        "PHOTOS": folder / "collection",
        "DIR": folder / "originals",
        "WEIGHTS": with_text,
        "EMBEDDINGS": embeddings,
        "LATENTS": latents,
        "runs/small/fine/weights": tiny_weights,
        "runs/small/pixel_decoder/weights": tiny_weights,
        "t5": t5_folder,
        "T5": t5_folder,
        "SD_VAE": sd_vae_folder,
        "REPOSITORY": hubs["t5"],
        "google/t5-v1_1-xxl": hubs["t5"],
        "stabilityai/sd-vae-ft-mse": hubs["sd_vae"],
    }


@pytest.fixture(name="place")
def in_a_folder_of_its_own(made, small_configs, tiny_weights, tmp_path, monkeypatch):
    """`place(names)` goes into a folder where these placeholders are."""
    monkeypatch.setattr(weights, "DEFAULT", tiny_weights)

    def place(names):
        monkeypatch.chdir(tmp_path)
        for name in made.keys() & set(names):
            copy = shutil.copytree if made[name].is_dir() else shutil.copy
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            copy(made[name], name)
        if "runs/NAME" in names:
            data = {"sources": (str(made["DIR"]),), "text": str(made["EMBEDDINGS"])}
            config = small_configs("configs/dit_3b.py")
            train(
                dataclasses.replace(config, output="runs/NAME", data=dataclasses.replace(config.data, **data))
            )

    return place


@pytest.fixture(name="small_configs")
def make_small_configs(made, tiny_weights, monkeypatch, idle_steps, quick_lpips):
    """`train` and `prepare` read the project's configs with a tiny model, for one step on two small crops."""

    def small(path):
        config = load_config(ROOT / path)
        dit = dataclasses.replace(TINY.dit, text_width=16 if config.model.dit.text_width else 0)
        side = 128 if config.stage == "coarse" else 64
        crops = {"resolutions": (side,), "aspect_ratios": (1.0,), "batch_size": 2, "workers": 0}
        return dataclasses.replace(
            config,
            model=dataclasses.replace(TINY, dit=dit),
            init_from=str(made["WEIGHTS"] if dit.text_width else tiny_weights) if config.init_from else "",
            data=dataclasses.replace(config.data, **crops),
            loss=dataclasses.replace(config.loss, lpips_crop=0),
            statistics_images=2,
            sample_every=0,
            steps=1,
        )

    for module in ("command_line", "train"):  # prepare asks the first, when it needs it
        monkeypatch.setattr(f"zipir_jax.{module}.load_config", small)
    return small


@functools.cache
def serve(*arguments):
    """The app in a process of its own: (the line that it printed, its page), and Ctrl-C once it was asked for that."""
    command = [sys.executable, "-m", "zipir_jax.app", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            printed = server.stdout.readline()
            address = f"http://127.0.0.1:{printed.rpartition(':')[2].strip()}"
            with urllib.request.urlopen(address, timeout=60) as answer:
                page = answer.read().decode()
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 130
        finally:
            server.kill()
    return printed, page


def make(*arguments):
    """Our Makefile in this folder, with the Python that runs the tests in the place of an installed one."""
    python = Path(".venv/bin/python")
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    command = ["make", "-f", ROOT / "Makefile", "-o", ".venv/.installed", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, call, place, monkeypatch):
    words = words_of(command)
    program = re.sub(r"^\.venv/bin/", "", words[0])
    scripts = [word for word in words if word.startswith("launch/")]
    if words[0] == "make":
        if "INPUT=photo.jpg" in words:
            place(["photo.jpg"])
            make(*words[1:])
            assert Path("output/photo_x4.png").exists()
        else:  # takes minutes, or is what runs this
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif (
        scripts
    ):  # of a training: what follows is its config and what overrides it; tests/test_launch.py runs them
        assert os.access(ROOT / scripts[0], os.X_OK)
        config, *overrides = words[words.index(scripts[0]) + 1 :]
        only_parse("zipir_jax.train", ["--config", config, "--resume", "auto", *overrides], call, monkeypatch)
    elif program in OF_OTHERS:
        assert set(re.findall(EXTRA, command)) <= extras()
    elif program == "python" and words[1] != "-m":
        compile((ROOT / words[1]).read_text(), words[1], "exec")
    else:
        assert (program, words[1]) == ("python", "-m"), "no table has such a command"
        module, *arguments = words[2:]
        entry = beginning(" ".join(words[2:]), (*RUN, *PARSED))
        assert entry is not None, "no table has such a command"
        if entry in PARSED:
            only_parse(module, arguments, call, monkeypatch)
            return
        if entry == "zipir_jax.app":
            printed, page = serve(*arguments, *RUN[entry])
            assert re.fullmatch(r"http://[\d.]+:\d+\n", printed) and "gradio" in page
            return
        written = {i + 1 for i, word in enumerate(arguments) if word in WRITTEN}
        place([word for i, word in enumerate(arguments) if i not in written])
        made_by_it = [Path(arguments[i]) for i in written]
        if not {"--dry-run", "--help"} & set(arguments):
            arguments = [SMALLER.get(word, word) for word in arguments] + list(RUN[entry])
        status, _, printed = call(importlib.import_module(module).main, *arguments)
        assert status == 0, printed
        if not {"--dry-run", "--help"} & set(arguments):
            for path in made_by_it:  # several samples have numbers in their names
                assert path.exists() or list(path.parent.glob(f"{path.stem}_[0-9]*"))


@each_document
def test_commands_within_the_text_are_understood(document, call, monkeypatch):
    for code in code_of(document):
        if code.startswith("python -m zipir_jax."):
            module, *arguments = words_of(code)[2:]
            only_parse(module, arguments, call, monkeypatch)


def only_parse(module, arguments, call, monkeypatch):
    """Give the arguments to an entry point that does nothing when it has understood them."""
    understood = []

    def parse_alone(*args, **options):
        understood.append(parse(*args, **options))
        return lambda: 0

    module = importlib.import_module(module)
    monkeypatch.chdir(ROOT)  # where the configs are
    monkeypatch.setattr(module, "parse", parse_alone)
    status, _, printed = call(module.main, *arguments)
    assert status == 0, printed
    assert understood or "--help" in arguments


def test_the_tables_hold_nothing_that_the_documents_do_not():
    commands = [words_of(parameter.values[0]) for parameter in COMMANDS]
    programs = {re.sub(r"^\.venv/bin/", "", words[0]) for words in commands}
    assert set(OF_OTHERS) <= programs
    ours = [" ".join(words[2:]) for words in commands if words[1:2] == ["-m"]]
    assert {beginning(command, (*RUN, *PARSED)) for command in ours} == {*RUN, *PARSED}
    assert set(SMALLER) <= {word for words in commands for word in words}


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("program", PROGRAMS)
def test_python_programs(program, made, place):
    place(name for name in made if re.search(rf"\b{name}\b", program))
    exec(compile(program, "program", "exec"), {})


def test_the_notebook(place):
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    place(())
    namespace = {}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert len(json.dumps(cell["outputs"])) < 20_000
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)


# --------------------------------------------------------------------------------------------------
# Links, paths, options
# --------------------------------------------------------------------------------------------------


def anchors(document):
    """Of the headings, as GitHub makes them."""
    parts = tokens(document)
    headings = [parts[i + 1].content for i, token in enumerate(parts) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document):
    targets = [token.attrs.get("href") or token.attrs.get("src") for token in tokens(document)]
    for target in filter(None, targets):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_leads_to_every_document():
    links = {token.attrs.get("href") for token in tokens(ROOT / "README.md")}
    documents = [*(ROOT / "docs").glob("*.md"), NOTEBOOK]
    assert {str(path.relative_to(ROOT)) for path in documents} <= links


@each_document
def test_paths_exist(document):
    folders = [ROOT, ROOT / "zipir_jax", ROOT / "docs" / "results", document.parent]
    tops = {path.name for folder in folders[:2] for path in folder.iterdir()} - {"runs", "output"}
    for code in code_of(document):
        path = code.partition(":")[0]
        if not re.fullmatch(r"[\w.\-/]+", path):
            continue
        is_file_of_ours = re.search(r"\.(py|md|sh|ipynb)$", path)
        if is_file_of_ours or ("/" in path and path.partition("/")[0] in tops):
            assert any((folder / path).exists() for folder in folders), code


@functools.cache
def extras():
    """That pip can install with the package."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()


@functools.cache
def defined(path):
    """Functions, classes and constants at the top of a file, methods and fields as Class.name."""

    def names(body, prefix=""):
        for node in body:
            if isinstance(node, ast.FunctionDef):
                yield prefix + node.name
            elif isinstance(node, ast.ClassDef):
                yield node.name
                yield from names(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign):
                yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign):
                yield prefix + node.target.id

    return set(names(ast.parse(path.read_text()).body))


@each_document
def test_functions_exist(document):
    for code in code_of(document):
        if match := re.fullmatch(r"([\w/]+\.py):([\w.]+)", code):
            path, name = match.groups()
            files = [folder / path for folder in (ROOT, ROOT / "zipir_jax") if (folder / path).is_file()]
            assert files and name in defined(files[0]), code


@pytest.fixture(scope="module")
def options():
    """Of all entry points and their commands."""
    ours = {entry.split()[0] for entry in (*RUN, *PARSED)}
    helps = [(module, [*command, "--help"]) for module in ours for command in commands_of(module)]
    found = {"--debug", "--help"}
    for module, arguments in helps:
        found |= set(re.findall(r"--[a-z][\w.-]*", help_of(module, arguments)))
    return found


def commands_of(module):
    """The commands of an entry point, as lists of words; one of no words where it has none."""
    return [[command] for command in getattr(importlib.import_module(module), "COMMANDS", ())] or [[]]


def help_of(module, arguments):
    import contextlib
    import io

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit):
            importlib.import_module(module).main(arguments)
    return printed.getvalue()


@each_document
def test_options_exist(document, options):
    for code in code_of(document):
        for option in re.findall(r"(?<![\w-])--[a-z][\w.-]*", code):
            assert option in options | OPTIONS_OF_OTHERS, code


@each_document
def test_commands_that_the_text_names_exist(document):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for code in code_of(document):
        assert set(re.findall(EXTRA, code)) <= extras(), code
        if match := re.match(r"(prepare|benchmark|make) ([a-z][\w-]*)", code):
            known = {"prepare": prepare.COMMANDS, "benchmark": benchmark.COMMANDS, "make": targets}
            assert match[2] in known[match[1]], code


# --------------------------------------------------------------------------------------------------
# What the documents say of the paper
# --------------------------------------------------------------------------------------------------


def test_the_paper_map_leaves_nothing_out():
    text = (ROOT / "docs" / "paper_map.md").read_text()
    ranges = re.findall(r"Figures (\d+) (?:to|and) (\d+)", text)
    figures = {number for first, last in ranges for number in range(int(first), int(last) + 1)}
    figures |= {int(number) for number in re.findall(r"^\| Figure (\d+) ", text, re.MULTILINE)}
    assert figures == set(range(1, 23))
    assert set(re.findall(r"^\| Table (\d) ", text, re.MULTILINE)) == set("123456")
    assert set(re.findall(r"^\| ([A-Z]) \|", text, re.MULTILINE)) == set("ABCDEFGH")
    headings = " ".join(re.findall(r"^## .*", text, re.MULTILINE))
    assert all(f"ection {section}" in headings for section in ("1", "2", "3.1", "3.2", "4"))
    assert all(f"4.{part}" in text for part in (1, 2, 3, 4))


def test_the_papers_configs_have_the_papers_numbers():
    text = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| batch (\d+), (\d+)K steps \|", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["lpvae_coarse", "lpvae_fine_512", "lpvae_fine_1k", "dit_3b"]
    for name, batch, thousands in [*rows, ("dit_0p68b", *rows[-1][1:])]:
        config = load_config(ROOT / "configs" / f"{name}.py")
        assert (config.data.batch_size, config.steps) == (int(batch), 1000 * int(thousands))
    expected = {"lpvae_fine_512": (512,), "lpvae_fine_1k": (1024,), "dit_3b": (512, 1024, 2048, 4096)}
    for name, resolutions in expected.items():
        assert load_config(ROOT / "configs" / f"{name}.py").data.resolutions == resolutions
