"""The command line, run in this process: reports, exit codes, and one line for every mistake."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import webbrowser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnkit import SeqLens, masks
from attnkit.__main__ import main
from attnkit.backends import emulated
from attnkit.config import AttentionConfig, MultiHeadAttentionConfig
from attnkit.doctor import CASES, Result, command, view
from attnkit.doctor.cases import OTHER_CASES, Case
from attnkit.doctor.screen import Screen

FEW = ("--only", "mode-3@float32", "--only", "alibi@float32")
NO_TORCH_NPU = "attnkit.doctor.findings.npu_absence"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes its report into the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "model.yaml"
    file.write_text("{num_heads: 4, head_dim: 32, mask: Causal() & SlidingWindow(256)}")
    return file


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    file = tmp_path / "packed.yaml"
    file.write_text("{num_heads: 4, head_dim: 32, mask: Causal(), layout: TND, dropout: 0.1}")
    return file


# -- doctor --------------------------------------------------------------------------------


def test_the_quick_suite_passes_on_the_emulator_and_prints_json(capsys: Any):
    assert main(["doctor", "--quick", "--json", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert report["status"] == "complete"
    assert report["target"].startswith("emulator, not hardware")
    assert report["hardware"] is False
    quick = [case.name for case in CASES if case.quick]
    assert [case["case"] for case in report["cases"]] == quick
    assert report["summary"]["passed"] == report["summary"]["expected"] == len(quick)
    assert report["timings"]["target"].startswith("emulator, not hardware")
    assert all(row["plan"] > 0 and row["dense"] > 0 for row in report["timings"]["rows"])
    assert report["weights"] is None
    assert report["findings"]["backends"]["emulated"] == []
    assert report["findings"]["backends"]["ascend"][0]["code"] == "device"
    assert not list(Path().iterdir())


def test_a_report_file_and_a_summary_that_says_what_it_is_of(capsys: Any):
    assert main(["doctor", *FEW, "--device", "cpu", "--out", "found.json"]) == 0
    assert [path.name for path in Path().iterdir()] == ["found.json"]
    report = json.loads(Path("found.json").read_text())
    assert report["summary"] == {
        "expected": 2,
        "passed": 2,
        "failed": 0,
        "error": 0,
        "refused": 0,
    }
    out = capsys.readouterr().out
    assert out.count("emulator, not hardware") >= 3
    assert "complete: 2 passed, 0 failed, 0 refused of 2 cases" in out


def test_a_planted_fault_is_reported_with_the_line_that_reruns_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    right = emulated.emulate

    def scaled(*given: Any, **more: Any) -> Any:
        out, peak, total = right(*given, **more)
        return out * 1.01, peak, total

    monkeypatch.setattr(emulated, "emulate", scaled)
    assert main(["doctor", *FEW, "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAILED mode-3@float32" in out
    assert "composition: Causal(); BSND, batch 2, 24 x 24, 4 heads of 16" in out
    assert "output, mean error" in out
    (line,) = (text for text in out.splitlines() if "rerun" in text and "mode-3" in text)
    again = shlex.split(line.partition("python -m attnkit ")[2])
    assert main(again) == 1
    report = json.loads(Path(command.DEFAULT_FILE).read_text())
    assert [case["name"] for case in report["cases"]] == ["mode-3@float32"]
    assert report["cases"][0]["status"] == "failed"


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_leaves_a_valid_partial_report(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    right, seen = command.run_case, []

    def stopped(case: Any, **given: Any) -> Result:
        seen.append(case.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return right(case, **given)

    monkeypatch.setattr(command, "run_case", stopped)
    options = ["--json"] if as_json else []
    assert main(["doctor", "--quick", "--device", "cpu", *options, "--out", "found.json"]) == 130
    out = capsys.readouterr().out
    report = json.loads(Path("found.json").read_text())
    assert report["status"] == "interrupted"
    assert [case["case"] for case in report["cases"]] == seen[:2]
    assert report["summary"]["expected"] > 2
    if as_json:
        assert json.loads(out) == report
    else:
        assert "interrupted: 2 passed" in out


def test_the_file_is_valid_while_the_suite_runs(monkeypatch: pytest.MonkeyPatch):
    right, states = command.run_case, []

    def watched(case: Any, **given: Any) -> Result:
        report = json.loads(Path("found.json").read_text())
        states.append((report["status"], len(report["cases"])))
        return right(case, **given)

    monkeypatch.setattr(command, "run_case", watched)
    assert main(["doctor", *FEW, "--device", "cpu", "--out", "found.json"]) == 0
    assert states == [("running", 0), ("running", 1)]


def test_a_defect_of_the_doctor_keeps_what_was_found(monkeypatch: pytest.MonkeyPatch):
    def defect(case: Any, **given: Any) -> Result:
        raise ZeroDivisionError

    monkeypatch.setattr(command, "run_case", defect)
    with pytest.raises(ZeroDivisionError):
        main(["doctor", *FEW, "--device", "cpu", "--out", "found.json"])
    assert json.loads(Path("found.json").read_text())["status"] == "broken"


def test_no_npu_where_one_was_demanded(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(NO_TORCH_NPU, lambda: "torch_npu is not installed")
    assert main(["doctor", "--device", "npu:1"]) == 3
    assert capsys.readouterr().err == "error: --device npu:1: torch_npu is not installed\n"


def test_an_npu_beyond_those_that_there_are(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    npu = SimpleNamespace(device_count=lambda: 2, get_device_name=lambda device: "a name")
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setattr(torch, "device", lambda name: SimpleNamespace(type="npu", index=2))
    monkeypatch.setattr(NO_TORCH_NPU, lambda: None)
    assert main(["doctor", "--device", "npu:2"]) == 3
    assert "npu:2 is not there; this machine has npu:0 to npu:1" in capsys.readouterr().err


def test_a_refused_case_is_told_and_is_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    # Cells that only a function knows cannot go into a packed call, whatever the planner learns.
    mask = masks.Predicate(lambda b, h, i, j: i != j)
    lengths = SeqLens((8, 4), (8, 4))
    opaque = Case("opaque", mask, layout="TND", q_len=12, kv_len=12, seqlens=lengths)
    monkeypatch.setattr(command, "CASES", (opaque,))
    assert main(["doctor", "--device", "cpu", "--only", "opaque@bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "0 passed, 0 failed, 1 refused" in out
    assert "refused opaque@bfloat16: emulated: " in out


def test_cases_are_listed(capsys: Any):
    assert main(["doctor", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [case.name for case in (*CASES, *OTHER_CASES)]


def test_tables_are_plain(capsys: Any):
    assert main(["doctor", *FEW, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "cases         passed  failed  refused" in out
    assert "biases             1       0        0" in out


# -- plan ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["emulated", "ascend", "auto", "reference"])
def test_a_plan_for_every_backend(backend: str, config: Path, capsys: Any):
    command_line = ["plan", "--config", str(config), "--batch", "2", "--q-len", "4096"]
    assert main([*command_line, "--kv-len", "4096", "--backend", backend]) == 0
    out = capsys.readouterr().out
    assert "sparse_mode=4" in out
    assert "BSND, batch 2, 4,096 queries x 4,096 keys, 4 heads of 32" in out
    assert ("note" in out) == (backend == "ascend")


def test_a_plan_for_packed_sequences(packed: Path, capsys: Any):
    command_line = ["plan", "--config", str(packed), "--lengths", "3,5,8", "--backend", "emulated"]
    assert main([*command_line, "--train", "--dtype", "float16"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "TND, 3 sequences, 16 queries x 16 keys in all" in out
    assert "actual_seq_qlen=(3, 8, 16)" in out
    assert "keep_prob=0.9" in out
    assert main([*command_line, "--kv-lengths", "4,5,9"]) == 0
    assert "actual_seq_kvlen=(4, 9, 18)" in capsys.readouterr().out
    assert main(["plan", "--mask", "Causal()", *command_line[3:]]) == 0
    assert "TND, 3 sequences" in capsys.readouterr().out


def test_a_plan_of_a_mask_alone_and_of_a_file_with_other_values(config: Path, capsys: Any):
    command_line = ["plan", "--q-len", "512", "--backend", "emulated"]
    assert main([*command_line, "--mask", "SlidingWindow(256)"]) == 0
    alone = capsys.readouterr().out
    assert "pre_tokens=255" in alone
    assert "512 queries x 512 keys, 8 heads of 64" in alone
    given = ["--mask", "SlidingWindow(128)", "--num-heads", "2", "--head-dim", "16"]
    for file in ([], ["--config", str(config)]):
        assert main([*command_line, *file, *given]) == 0
        out = capsys.readouterr().out
        assert "pre_tokens=127" in out
        assert "2 heads of 16" in out


def test_a_plan_of_a_layer_whose_values_have_another_size(capsys: Any):
    text = "{dim: 64, num_heads: 4, head_dim: 32, v_head_dim: 16, mask: Causal()}"
    Path("model.yaml").write_text(text)
    assert main(["plan", "--config", "model.yaml", "--q-len", "64", "--backend", "emulated"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "key bfloat16[1, 64, 4, 32], value bfloat16[1, 64, 4, 16]" in out


def test_a_plan_of_a_configuration_somewhere_in_a_file(capsys: Any):
    Path("model.yaml").write_text(
        "model:\n"
        "  attention: {num_heads: 4, head_dim: 32, mask: SlidingWindow(64)}\n"
        "  layers:\n"
        "  - {dim: 2147483647, num_heads: 2, head_dim: 16, mask: SlidingWindow(32), rotary: true}\n"
        "  - {num_heads: 4, head_dim: 32, maks: Causal()}\n"
    )
    plan = ["plan", "--config", "model.yaml", "--q-len", "128", "--backend", "emulated", "--at"]
    for key, found, heads in (
        ("model.attention", "pre_tokens=63", "4 heads of 32"),
        ("model.layers.0", "pre_tokens=31", "2 heads of 16"),  # its projections take no memory
    ):
        assert main([*plan, key]) == 0
        out = capsys.readouterr().out
        assert found in out
        assert heads in out
    for key, told in (
        ("model.atention", "at model there is no key 'atention'; did you mean 'attention'?"),
        ("model.layers.7", "at model.layers there is no key 7. Known: 0, 1"),
        ("model.attention.num_heads.x", "at model.attention.num_heads there is no key 'x'"),
        ("model.layers.1", "maks: unknown key; did you mean 'mask'?"),
        ("model.layers.1", "(line 5, column 40)"),
        ("model", "is missing"),
    ):
        assert main([*plan, key]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ([], AttentionConfig),
        (["attention"], AttentionConfig),
        (["multi-head-attention"], MultiHeadAttentionConfig),
    ],
)
def test_the_schema(name: list[str], model: type[AttentionConfig], capsys: Any):
    assert main(["schema", *name]) == 0
    assert json.loads(capsys.readouterr().out) == model.model_json_schema()


def test_the_console_script_is_the_command_line():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    (target,) = re.findall(r'\[project.scripts\]\nattnkit = "(.*)"\n', project)
    module, _, function = target.partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_a_plan_as_json_and_as_a_picture(config: Path, capsys: Any):
    command_line = ["plan", "--config", str(config), "--q-len", "512", "--backend", "emulated"]
    assert main([*command_line, "--json", "--plot", "plan.png"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["backend"] == "emulated"
    assert plan["plan"]["calls"][0]["arguments"]["sparse_mode"] == 4
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_for_ranks(config: Path, packed: Path, capsys: Any):
    command_line = ["plan", "--config", str(config), "--q-len", "512", "--ranks", "4", "--train"]
    chosen = ["--method", "hybrid", "--heads-ways", "2", "--balance", "zigzag", "--stages", "1"]
    assert main([*command_line, *chosen, "--backend", "ascend"]) == 0
    told = capsys.readouterr().out
    assert "attention over 4 ranks: hybrid 2 x 2, 1 stage" in told
    assert "its calls are those that 'emulated' makes" in " ".join(told.split())
    assert main([*command_line, "--json", "--plot", "plan.png"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == [128] * 4
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "--config", str(packed), "--lengths", "30,50", "--ranks", "3"]) == 0
    assert "26 to 27 per rank" in capsys.readouterr().out


def page_of(file: str = view.DEFAULT_FILE) -> dict[str, Any]:
    """Return the data of a page."""
    text = Path(file).read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    found: dict[str, Any] = json.loads(data)
    return found


def test_a_page_of_a_plan(config: Path, capsys: Any):
    given = ["view", "--config", str(config), "--q-len", "512", "--backend", "emulated"]
    assert main(given) == 0
    assert capsys.readouterr().out == "page: attnkit-plan.html\n"
    data = page_of()
    assert data["title"] == "Causal() & SlidingWindow(256)"
    assert data["kind"] == "calls"
    names = ["--config", str(config), "--q-len", "512", "--dtype", "bfloat16"]
    assert data["command"] == ["attnkit", "view", *names, "--backend", "emulated"]
    again = [*data["command"][1:], "--mask", "SlidingWindow(3)", "-o", "other.html"]
    assert main(again) == 0
    assert page_of("other.html")["title"] == "SlidingWindow(3)"


def test_a_page_of_packed_sequences_needs_no_configuration(capsys: Any):
    given = ["--mask", "Causal()", "--lengths", "3,5", "--ranks", "2", "-o", "a.html", "--train"]
    assert main(["view", *given]) == 0
    data = page_of("a.html")
    assert data["ranks"]["size"] == 2
    assert data["sizes"] == [[3, 3], [5, 5]]
    assert main([*data["command"][1:], "--mask", data["mask"]]) == 0
    assert page_of("a.html") == data
    assert main(["plan", "--mask", "Causal()", "--lengths", "3,5", "--backend", "emulated"]) == 0
    assert "TND, 2 sequences" in capsys.readouterr().out


def test_a_page_of_what_was_not_asked_of_hardware():
    given = ["view", "--mask", "Causal()", "--q-len", "8", "--backend", "ascend"]
    assert main(given) == 0
    assert "no installed op was asked" in page_of()["note"]


def test_a_page_is_opened_when_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert main(["view", "--mask", "Causal()", "--q-len", "8", "--open"]) == 0
    assert opened == [Path(view.DEFAULT_FILE).resolve().as_uri()]
    assert "no browser was found" in capsys.readouterr().out  # the append answers None


@pytest.mark.parametrize(
    ("command_line", "told"),
    [
        (["view", "--q-len", "8"], "say what to plan: --config FILE, or --mask TEXT"),
        (["view", "--mask", "Causal(", "--q-len", "8"], "Causal("),
        (["view", "--mask", "Causal()", "--q-len", "8", "--stages", "2"], "--ranks P"),
        (["view", "--mask", "Causal()", "--q-len", "8", "-o", "folder"], "is a directory"),
        (["view", "--mask", "Causal()", "--q-len", "8", "-o", "no/a.html"], "no directory no"),
        (["view", "--mask", "Causal()", "--q-len", "8", "-o", "a\0b"], "null byte"),
        (["plan", "--mask", "Causal()", "--q-len", "8", "--stages", "2"], "--ranks P"),
        (["plan", "--mask", "Causal()", "--q-len", "8", "--ranks", "99999999"], "at most"),
        (["plan", "--mask", "Causal()", "--q-len", "8", "--ranks", "2", "--method", "x"], "choice"),
        ([], "the following arguments are required: command"),
        (["operate"], "invalid choice: 'operate'"),
        (["doctor", "--fast"], "unrecognized arguments: --fast"),
        (["doctor", "--quick", "--full"], "not allowed with argument"),
        (["doctor", "--only", "mode-33"], "did you mean 'mode-3'"),
        (["doctor", "--only", "mode-3@int8"], "the dtype is one of float32, float16, bfloat16"),
        (["doctor", "--device", "abacus"], "no such device"),
        (["doctor", "--device", "cpu", "--out", "no/such/folder.json"], "No such file"),
        (["plan"], "say what to plan: --config FILE, or --mask TEXT"),
        (["doctor", "--only", "x" * 100_000], "no case has this name; --list shows them"),
        (["doctor", "--device", "meta"], "the doctor runs on npu, cuda and cpu"),
        (["doctor", "--device", "cpu", "--backend", "flax"], "did you mean 'flex'?"),
        (["doctor", "--out", "folder"], "--out folder: Is a directory"),
        (["doctor", "--out", ""], "has an empty name"),
        (["doctor", "--out", "a\0b"], "embedded null byte"),
        (["plan", "--config", "none.yaml", "--q-len", "8"], "none.yaml': No such file"),
        (["plan", "--config", "folder", "--q-len", "8"], "'folder': Is a directory"),
        (["plan", "--config", "a\0b", "--q-len", "8"], "embedded null byte"),
        (["plan", "--config", "binary.yaml", "--q-len", "8"], "is not UTF-8 text"),
        (["plan", "--config", "model.yaml", "--q-len", "9" * 30], "from 1 to 2147483647"),
        (["plan", "--config", "model.yaml", "--q-len", "9" * 5_000], "from 1 to 2147483647"),
        (
            ["plan", "--config", "model.yaml", "--q-len", "8", "--batch", "10000000"],
            "at most 4,096",
        ),
        (["plan", "--config", "packed.yaml", "--lengths", "9" * 30], "is not a list of lengths"),
        (["plan", "--config", "packed.yaml", "--lengths", "1," * 9_999 + "1"], "at most 4,096"),
        (
            ["plan", "--config", "wide.yaml", "--q-len", "2147483647"],
            "num_heads=2147483647; it is at most 1,048,576",
        ),
        (["plan", "--config", "model.yaml", "--q-len", "8", "--plot", "folder"], "with its format"),
        (["plan", "--config", "model.yaml", "--q-len", "8", "--plot", "folder.png"], "a directory"),
        (["plan", "--config", "model.yaml", "--q-len", "8", "--plot", "no/a.png"], "no directory"),
        (["plan", "--config", "model.yaml", "--q-len", "8", "--plot", "a\0.png"], "--plot a"),
        (["plan", "--config", "model.yaml"], "layout BSND needs --q-len N"),
        (["plan", "--config", "model.yaml", "--q-len", "none"], "is not a whole number from 1"),
        (["plan", "--config", "model.yaml", "--lengths", "3,5"], "takes --batch, --q-len"),
        (["plan", "--config", "packed.yaml", "--q-len", "8"], "say --lengths 3,5,8"),
        (["plan", "--config", "packed.yaml", "--lengths", "3;5"], "is not a list of lengths"),
        (["plan", "--config", "packed.yaml", "--lengths", "3", "--batch", "2"], "not --batch"),
        (["plan", "--config", "broken.yaml", "--q-len", "8"], "did you mean 'mask'"),
        (
            ["plan", "--config", "capped.yaml", "--q-len", "8", "--backend", "emulated"],
            "softcap=3.0 is a term the fused kernel does not have",
        ),
        (
            ["plan", "--config", "model.yaml", "--q-len", "8", "--plot", "plan.doc"],
            "--plot plan.doc: ",
        ),
    ],
)
@pytest.mark.usefixtures("config", "packed")
def test_a_mistake_is_one_line_and_exit_code_2(command_line: list[str], told: str, capsys: Any):
    Path("broken.yaml").write_text("{num_heads: 4, head_dim: 32, maks: Causal(), layot: TND}")
    Path("capped.yaml").write_text("{num_heads: 4, head_dim: 32, softcap: 3.0}")
    Path("wide.yaml").write_text("{num_heads: 2147483647, head_dim: 2147483647}")
    Path("binary.yaml").write_bytes(b"\xff\xfe\0")
    Path("folder").mkdir()
    Path("folder.png").mkdir()
    before = set(Path().iterdir())
    assert main(command_line) == 2
    assert set(Path().iterdir()) <= before | {Path(command.DEFAULT_FILE)}  # nothing beside it
    err = capsys.readouterr().err
    assert len(err) < 2_100
    assert err.startswith("error: ")
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), [(BrokenPipeError, 0), (OSError(28, "No space"), 2)])
def test_a_standard_output_that_takes_no_more(
    error: OSError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def full(screen: Screen, text: str = "") -> None:
        raise error

    monkeypatch.setattr(Screen, "line", full)
    assert main(["doctor", "--list"]) == code
    assert capsys.readouterr().err == ("error: cannot write: No space\n" if code else "")


def test_a_report_that_does_not_fit_leaves_no_draft(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def full(path: Path, text: str, encoding: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["doctor", *FEW, "--device", "cpu", "--out", "found.json"]) == 2
    assert capsys.readouterr().err == "error: --out found.json: No space left on device\n"
    assert not list(Path().iterdir())


def test_help_is_no_mistake(capsys: Any):
    assert main(["doctor", "--help"]) == 0
    assert "--only NAME" in capsys.readouterr().out
