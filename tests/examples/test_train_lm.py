"""The training script, on a model of a few hundred weights."""

from __future__ import annotations

import json
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnkit as ak
import train_lm
from lm import checkpoint
from lm.config import RunError, load_config
from lm.data import START, Corpus, load_corpus, training_batches
from lm.model import LanguageModel, write_on
from tests.examples.conftest import WriteConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples/configs").glob("*.yaml"))


def run(config: Path, out: Path, *flags: str) -> int:
    return train_lm.main(["--config", str(config), "--out", str(out), "--device", "cpu", *flags])


def state(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(out / "checkpoint.pt", weights_only=True)
    return content


def assert_same(a: object, b: object) -> None:
    """Compare two checkpoints, or parts of them, to the last bit."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert isinstance(b, list | tuple)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train on two of the shorter topics: what is tested here does not depend on the text."""
    corpus = load_corpus()
    by_size = sorted(corpus.train, key=lambda d: len(d.text))
    small = Corpus(train=tuple(by_size[:2]), held_out=tuple(by_size[2:3]))
    monkeypatch.setattr(train_lm, "load_corpus", lambda: small)


@pytest.fixture
def straight(write_config: WriteConfig, tmp_path: Path) -> dict[str, Any]:
    """Return the final state of the tiny run, trained in one go."""
    assert run(write_config(), tmp_path / "straight") == 0
    return state(tmp_path / "straight")


def test_a_run_leaves_everything_it_promises(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(write_config(), out) == 0
    printed = capsys.readouterr().out
    assert printed.index("Causal()") < printed.index("held out")  # the plan comes first
    assert "unigram" in printed
    assert "bigram" in printed
    assert {p.name for p in out.iterdir()} == {
        "checkpoint.pt",
        "loss.png",
        "metrics.json",
        "sample.txt",
    }
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").read_text(encoding="utf-8").startswith("ab")
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["steps"] == 6
    assert set(figures["held_out_bits_per_byte"]) == {"unigram", "bigram", "model"}


def test_the_seed_decides_everything(
    straight: dict[str, Any], write_config: WriteConfig, tmp_path: Path
) -> None:
    assert run(write_config(), tmp_path / "again") == 0
    assert_same(straight, state(tmp_path / "again"))
    assert run(write_config(), tmp_path / "other", "--seed", "1") == 0
    other = state(tmp_path / "other")
    assert other["progress"]["train_bits"] != straight["progress"]["train_bits"]


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_resume_is_exact_to_the_last_bit(
    stop: int, straight: dict[str, Any], write_config: WriteConfig, tmp_path: Path
) -> None:
    config, out = write_config(), tmp_path / "out"
    assert run(config, out, "--stop-at", str(stop)) == 0
    assert state(out)["progress"]["step"] == stop
    torch.manual_seed(1234)  # whatever ran in between must not matter
    assert run(config, out, "--resume") == 0
    assert_same(straight, state(out))


def test_resuming_a_finished_run_changes_nothing(
    straight: dict[str, Any], write_config: WriteConfig, tmp_path: Path
) -> None:
    assert run(write_config(), tmp_path / "straight", "--resume") == 0
    assert_same(straight, state(tmp_path / "straight"))


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(
    straight: dict[str, Any],
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only the main thread receives signals")
    config, out = write_config(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(train_lm, "learning_rate", _interrupting_at(2, train_lm.learning_rate))
        assert run(config, out) == 130
    assert "stopped after step 3" in capsys.readouterr().out
    assert state(out)["progress"]["step"] == 3
    assert run(config, out, "--resume") == 0
    assert_same(straight, state(out))


def _interrupting_at(step: int, learning_rate: Any) -> Any:
    def interrupting(now: int, training: Any) -> float:
        if now == step:
            signal.raise_signal(signal.SIGINT)
        rate: float = learning_rate(now, training)
        return rate

    return interrupting


def test_the_schedule_warms_up_and_comes_down(write_config: WriteConfig) -> None:
    training = load_config(write_config(training={"steps": 100, "warmup": 9})).training
    rates = [train_lm.learning_rate(step, training) for step in range(100)]
    assert rates[0] == pytest.approx(0.001)
    assert max(rates) == pytest.approx(0.01)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.0003


# -- what was wrong, in one line ------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"stpes": 5}}, ["training.stpes", "did you mean 'steps'", "learning_rate"]),
        ({"training": {"steps": 0}}, ["training.steps", "greater than or equal to 1", "given: 0"]),
        ({"training": {"steps": "many"}}, ["training.steps", "'many'"]),
        ({"training": {"learning_rate": float("inf")}}, ["training.learning_rate", "finite"]),
        ({"training": {"clip_norm": float("nan")}}, ["training.clip_norm"]),
        ({"sample": {"temperature": float("inf")}}, ["sample.temperature", "finite"]),
        ({"training": {"seed": 2**70}}, ["training.seed", "less than"]),
        ({"model": {"dim": 2**50}}, ["no room for this model on cpu"]),
        ({"training": None}, ["training", "required"]),
        ({"model": {"dim": None}}, ["model.dim", "given: None"]),
        ({"attention": {"num_head": 4}}, ["attention", "num_head:", "'num_heads'"]),
        ({"attention": {"mask": "Casual()"}}, ["attention", "mask:", "Casual", "Causal"]),
        ({"attention": {"mask": "Full()"}}, ["attention.mask", "Causal()"]),
        ({"attention": {"mask": "PrefixLM(8)"}}, ["attention.mask", "predict"]),
        ({"attention": {"layout": "BSND"}}, ["attention.layout", "BSND", "TND"]),
        ({"attention": {"num_kv_heads": 3}}, ["3", "4"]),
        ({"extra": {"a": 1}}, ["extra", "unknown key", "training"]),
    ],
)
def test_a_wrong_config_ends_with_one_line_and_code_2(
    changes: dict[str, Any],
    words: list[str],
    write_config: WriteConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(write_config(**changes), tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert message.startswith("train_lm: error: ")
    assert message.count("\n") == 1
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_a_wrong_path_ends_with_one_line_and_code_2(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config()
    for path in (tmp_path / "missing.yaml", tmp_path):
        assert run(path, tmp_path / "out") == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert str(path) in message
    assert run(tmp_path / "missing.yaml", tmp_path / "out") == 2
    assert "tiny.yaml" in capsys.readouterr().err  # what is there instead


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "a: [1\n", "", "a: !!int foo\n", "[" * 2000, "a: 2020-99-99\n"]
)
def test_a_file_that_is_no_config_ends_with_one_line_and_code_2(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert run(path, tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_resume_refuses_a_missing_damaged_or_foreign_checkpoint(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_config(), tmp_path / "out"
    assert run(config, out, "--resume") == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert run(config, out, "--stop-at", "1") == 0
    capsys.readouterr()
    assert run(config, out, "--resume", "--seed", "7") == 2
    assert "training.seed was 0, here it is 7" in capsys.readouterr().err
    (out / "checkpoint.pt").write_bytes(b"no checkpoint at all")
    assert run(config, out, "--resume") == 2
    assert "cannot be read" in capsys.readouterr().err


def saved(
    config: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[dict[str, Any], bytes]:
    """Leave a checkpoint of the first steps; return its content, read and as bytes."""
    assert run(config, out, "--stop-at", "4") == 0
    capsys.readouterr()
    return state(out), (out / "checkpoint.pt").read_bytes()


def test_a_full_disk_ends_with_one_line_and_leaves_the_checkpoint_before(
    straight: dict[str, Any],
    write_config: WriteConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no disk that is always full")
    config, out = write_config(), tmp_path / "out"
    _, before = saved(config, out, capsys)
    (out / "checkpoint.unfinished").symlink_to("/dev/full")
    assert run(config, out, "--resume") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for words in ("cannot write the checkpoint", "No space left", "the one before, and whole"):
        assert words in message
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt"}
    assert (out / "checkpoint.pt").read_bytes() == before
    assert run(config, out, "--resume") == 0  # once there is room
    assert_same(straight, state(out))


def test_a_place_that_takes_no_files_is_noticed_before_training(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train_lm, "train", lambda run: pytest.fail("it trains"))
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "checkpoint.pt").mkdir(parents=True)
    places = [tmp_path / "file", tmp_path / "file" / "below", tmp_path / "taken"]
    if Path("/proc/self").exists():
        places.append(Path("/proc/self"))  # a directory that takes nobody's files, root's included
    for place in places:
        assert run(write_config(), place) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert f"cannot write to --out {place}" in message
    for flags in (["--resume"], ["--stop-at", "0"]):
        assert run(write_config(), tmp_path / "file", *flags) == 2
        assert capsys.readouterr().err.count("\n") == 1


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no format": lambda s: s.pop("format"),
    "no config": lambda s: s.pop("config"),
    "no model": lambda s: s.pop("model"),
    "no generators": lambda s: s.pop("generators"),
    "one part more": lambda s: s.update(extra={}),
    "config a list": lambda s: s.update(config=[]),
    "model a tensor": lambda s: s.update(model=torch.zeros(3)),
    "progress a number": lambda s: s.update(progress=3),
    "no step": lambda s: s["progress"].pop("step"),
    "step a word": lambda s: s["progress"].update(step="x"),
    "step below 0": lambda s: s["progress"].update(step=-5),
    "step beyond the end": lambda s: s["progress"].update(step=7),
    "step a truth value": lambda s: s["progress"].update(step=True, train_bits=[1.0]),
    "step without its losses": lambda s: s["progress"].update(step=3),
    "losses a word": lambda s: s["progress"].update(train_bits="1234"),
    "losses of words": lambda s: s["progress"].update(train_bits=["1"] * 4),
    "held out a list": lambda s: s["progress"].update(held_out_bits=[1.0]),
    "held out at a word": lambda s: s["progress"].update(held_out_bits={"4": 1.0}),
    "another name in progress": lambda s: s["progress"].update(speed=3),
    "a weight less": lambda s: s["model"].popitem(),
    "a weight more": lambda s: s["model"].update(more=torch.zeros(2)),
    "a weight of another shape": lambda s: s["model"].update({"norm.weight": torch.zeros(3)}),
    "a weight of another dtype": lambda s: s["model"].update(
        {"norm.weight": torch.zeros(16, dtype=torch.float64)}
    ),
    "a weight that is a word": lambda s: s["model"].update({"norm.weight": "x"}),
    "no groups": lambda s: s["optimizer"].pop("param_groups"),
    "groups of others": lambda s: s["optimizer"].update(param_groups=[]),
    "other choices": lambda s: s["optimizer"]["param_groups"][0].update(weight_decay=0.5),
    "moments of another shape": lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
    "moments that are words": lambda s: s["optimizer"]["state"][0].update(exp_avg="x"),
    "no generator": lambda s: s["generators"].pop("cpu"),
    "a generator too short": lambda s: s["generators"].update(cpu=torch.zeros(3)),
    "a generator that is a word": lambda s: s["generators"].update(cpu="x"),
    "a key of another run": lambda s: s["config"]["model"].update(window=3),
    "a key of another run at the top": lambda s: s["config"].update(extra={"a": 1}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_checkpoint_with_other_parts_is_refused_in_one_line(
    change: Callable[[dict[str, Any]], object],
    write_config: WriteConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, out = write_config(), tmp_path / "out"
    content, _ = saved(config, out, capsys)
    change(content)
    torch.save(content, out / "checkpoint.pt")
    assert run(config, out, "--resume") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert str(out / "checkpoint.pt") in message


def test_a_damaged_checkpoint_never_loads_as_another(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_config(), tmp_path / "out"
    content, whole = saved(config, out, capsys)
    path = out / "checkpoint.pt"
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert run(config, out, "--resume") == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "cannot be read as a checkpoint" in message
    draw, refused = random.Random(0), 0
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            assert_same(content, checkpoint._read(path, torch.device("cpu")))  # padding, a date
        except RunError:
            refused += 1
    assert refused > 100


def test_a_device_that_is_not_there_is_named(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", str(write_config()), "--device", "abacus"]
    assert train_lm.main(flags) == 2
    assert "abacus" in capsys.readouterr().err


# -- the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["Causal()", "Causal() & (SlidingWindow(5) | Prefix(2))"])
@pytest.mark.parametrize("rotary", [True, False])
def test_writing_through_the_cache_is_the_full_forward(
    mask: str, rotary: bool, write_config: WriteConfig
) -> None:
    pse = None if rotary else {"kind": "alibi", "num_heads": 4}
    config = load_config(
        write_config(attention={"mask": mask, "pse": pse}, model={"rotary": rotary})
    )
    torch.manual_seed(0)
    model = LanguageModel(config.model, config.attention)
    prompt, temperature, seed = b"hello", 0.5, 3
    written = write_on(model, prompt, length=12, temperature=temperature, seed=seed)

    draws = torch.Generator().manual_seed(seed)
    text = [START, *prompt]
    model.eval()
    for _ in range(12):
        tokens = torch.tensor(text)
        scores = model(tokens, ak.SeqLens([len(text)]))[-1]
        probabilities = (scores / temperature).softmax(-1)
        text.append(int(torch.multinomial(probabilities, 1, generator=draws)))
    assert bytes(text[1:]) == prompt + written


def test_packed_sequences_do_not_see_each_other(write_config: WriteConfig) -> None:
    config = load_config(write_config())
    torch.manual_seed(0)
    model = LanguageModel(config.model, config.attention).eval()
    a, b = torch.randint(256, (7,)), torch.randint(256, (4,))
    packed = model(torch.cat([a, b]), ak.SeqLens([7, 4]))
    alone = model(b, ak.SeqLens([4]))
    torch.testing.assert_close(packed[7:], alone)


# -- the configs that are shipped -----------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    torch.manual_seed(0)
    model = LanguageModel(config.model, config.attention)
    batch = next(training_batches(load_corpus().train, max_len=64, tokens_per_batch=128, seed=0))
    assert model.explain_attention(batch)
    optimizer = train_lm.build_optimizer(model, config.training)
    before = model.loss(batch).item()
    for _ in range(3):
        torch.autograd.backward(model.loss(batch))
        optimizer.step()
        optimizer.zero_grad()
    assert model.loss(batch).item() < before


def test_the_configs_really_differ() -> None:
    assert len(CONFIGS) >= 3
    attentions = [load_config(path).attention for path in CONFIGS]
    assert len({str(a.mask) for a in attentions}) >= 2
    assert any(a.dropout for a in attentions)
    assert any(a.num_kv_heads not in (None, a.num_heads) for a in attentions)


def test_no_key_of_the_attention_section_is_lost_on_its_way(write_config: WriteConfig) -> None:
    terms = {"scale": 0.3, "softcap": 20.0, "sink": True, "backend": "reference"}
    config = load_config(write_config(attention=terms))
    block = LanguageModel(config.model, config.attention).blocks[0]
    got, asked = block.attention.attention, config.attention.build()
    assert got.extra_repr() == asked.extra_repr()
    assert got.composition == asked.composition
    assert got.sink is not None
