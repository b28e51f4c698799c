"""`zppo eval` from end to end: who decides what, whose words are used, how much is asked, and of how many servers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import make_tiny
from eval_server import Reply, Scripted, command, fair, results, right, rows, said, scripted, write_clip
from evaluate_data import write_data
from zppo import cli
from zppo.config.recipe import dump_yaml
from zppo.core.types import Message
from zppo.evals.endpoint import Server
from zppo.evals.item import Item
from zppo.evals.media import media_there
from zppo.evals.options import EvalOptions, with_words_of_run
from zppo.names import model_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of all benchmarks, and clips that can be decoded."""
    folder = write_data(tmp_path_factory.mktemp("rows"))
    for path in folder.rglob("*.mp4"):
        write_clip(path)
    return folder


def only(out: Path) -> dict[str, Any]:
    """The results of a folder that holds one benchmark."""
    (part,) = results(out)["benchmarks"]
    return dict(part)


# --- replies without a box ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_replies_without_a_box_go_to_the_judge_with_their_thoughts_and_both_figures_are_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """C-Eval's answers are C and A: one reply has no box, the other never ends its thoughts; the judge finds the second right."""
    replies = ["The third one, C.", "<think>so it must be A, which <response> is right"]

    def sees(body: dict[str, Any]) -> Reply:
        return '{"verdict": "correct"}' if "so it must be A" in said(body) else '{"verdict": "wrong"}'

    out = tmp_path / "out"
    with scripted(lambda body: replies[len(model.requests) - 1], "m") as model, scripted(sees, "j") as judge:
        arguments = command(model.url, judge, data, out, "CEval", "--concurrency", "1")
        assert cli.main(arguments) == 0
        shown = [said(body) for body in judge.requests]
        assert "The third one, C." in shown[0] and "[think]so it must be A, which [response] is right" in shown[1]
    part = only(out)
    assert (part["value"], part["by_box"], part["by_judge"], part["no_answer"], part["open"]) == (0.5, 0.0, 2, 2, 0)
    assert results(out)["families"]["llm"]["by_box"] == 0.0
    assert [(row["by"], row["value"], row["boxless"]) for row in rows(out, "CEval")] == [("judge", 0.0, True), ("judge", 1.0, True)]
    printed = " ".join(capsys.readouterr().out.split())
    assert "score ± by box" in printed and "CEval 50.0 50.0 0.0 2 0 2 2 0 0" in printed


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["AIME25", "InfoVQA", "OCREN"])
def test_benchmarks_with_rules_for_everything_ask_no_judge(suite: str, data: Path, tmp_path: Path) -> None:
    replies = ["hm", "<think>70", r"\boxed{about 70}"]
    with scripted(lambda body: replies[len(model.requests) % 3], "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, data, tmp_path, suite)) == 0
        assert model.requests and not judge.requests
    part = only(tmp_path)
    assert part["by_rule"] == part["rows"] == part["expected"] and part["open"] == 0


# --- what cannot be read ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_malformed_verdict_counts_0_is_named_and_closes_the_benchmark(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a reminder; `--strict` opens these rows again and asks the judge alone."""

    def moody(body: dict[str, Any]) -> Reply:
        return "I would say so." if "x^2=4" in str(body["messages"]) else '{"verdict": "correct"}'

    with scripted(lambda body: r"\boxed{A}", "m") as model, scripted(moody, "j") as judge:
        arguments = command(model.url, judge, data, tmp_path, "IMO-AB")
        assert cli.main(arguments) == 0
        assert len(judge.requests) == 3  # one of them a reminder
        part = only(tmp_path)
        assert (part["value"], part["rows"], part["open"]) == (0.5, 2, 0)
        assert (part["malformed"], part["malformed_rows"]) == (1, ["imo-bench-algebra-001"])
        row = next(row for row in rows(tmp_path, "IMO-AB") if row["error"])
        assert (row["by"], row["value"], row["reply"]) == ("judge", 0.0, "I would say so.")
        assert "IMO-AB: 1 of 2 rows are 0 since the judge's verdict was malformed" in capsys.readouterr().out
        assert cli.main(arguments) == 0 and len(judge.requests) == 3
        assert cli.main([*arguments, "--strict"]) == 2
        assert len(judge.requests) == 5 and (only(tmp_path)["open"], only(tmp_path)["judge_errors"]) == (1, 1)
        judge.reply = fair
        assert cli.main([*arguments, "--strict"]) == 0
        assert (only(tmp_path)["value"], only(tmp_path)["malformed"]) == (1.0, 0)
        assert len(model.requests) == 2


@pytest.mark.slow
@pytest.mark.parametrize("video", ["frames", "file"])
def test_a_clip_that_cannot_be_decoded_counts_0_is_named_and_closes_the_benchmark(
    video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The made-up clips are no clips; with others in their places they are asked about."""
    (tmp_path / "data").mkdir()
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    with scripted(right, "m") as model, scripted(fair, "j") as judge:
        arguments = command(model.url, judge, folder, out, "VMME", "--video", video)
        assert cli.main(arguments) == 0
        part = only(out)
        broken = [row["id"] for row in rows(out, "VMME") if row["finish"] == "broken_media"]
        assert part["broken_rows"] == sorted(broken) and part["broken"] == len(broken) > 0 == part["open"]
        assert part["no_answer"] == 0 and "cannot be decoded" in part["why_broken"]
        printed = capsys.readouterr().out
        assert f"rows are 0 since a clip or picture cannot be decoded: {broken[0]}" in printed
        assert cli.main([*arguments, "--strict"]) == 2
        assert only(out)["open"] == len(broken)
        for path in folder.rglob("*.mp4"):
            write_clip(path)
        assert cli.main(arguments) == 0
        assert (only(out)["broken"], only(out)["open"]) == (0, 0)


@pytest.mark.slow
def test_a_picture_that_cannot_be_decoded_counts_0_and_one_that_is_gone_stays_open(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    folder, out = write_data(tmp_path / "data"), tmp_path / "out"
    (folder / "images" / "red.png").write_bytes(b"no picture")
    with scripted(right, "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, folder, out, "AI2D")) == 0
    part = only(out)
    assert (part["broken"], part["open"], part["rows"]) == (1, 0, 2) and "red.png" in part["why_broken"]
    item = Item("1", "AI2D", (Message("user", "<image>?"),), "A", "choice", images=(folder / "images" / "red.png",))
    assert media_there(item)
    (folder / "images" / "red.png").unlink()
    assert not media_there(item)


# --- the judge and the words ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_judge_is_asked_for_where_rules_decide_all(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folder takes a judge when a benchmark with one comes; with another judge after that it is refused."""
    with scripted(lambda body: r"\boxed{70}", "m") as model, scripted(fair, "j") as judge, scripted(fair, "k") as other:
        alone = ["eval", model.url, "--suite", "AIME25,AIME26", "--data", str(data), "--output", str(tmp_path)]
        assert cli.main(alone) == 0 and cli.main([*alone, "--judge", "http://127.0.0.1:1/v1"]) == 0
        assert results(tmp_path)["settings"]["judge"] is None and "m, no judge" in capsys.readouterr().out
        assert cli.main(["eval", model.url, "--suite", "AIME25,IMO-AB", "--data", str(data), "--output", str(tmp_path)]) == 2
        assert "rules cannot decide (IMO-AB)" in " ".join(capsys.readouterr().err.split())
        assert cli.main(command(model.url, judge, data, tmp_path, "AIME25,IMO-AB")) == 0
        assert results(tmp_path)["settings"]["judge"] == "j" and judge.requests
        assert cli.main(alone) == 0
        assert cli.main(command(model.url, other, data, tmp_path, "IMO-AB")) == 2
        assert "judge = 'j', and now it is 'k'" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with a closing instruction and template arguments of its own."""
    (tmp_path / "closing.jinja").write_text("Answer in \\boxed{}, like a pirate.")
    recipe = {
        "student": {"model": "lab:unreachable/student", "template_args": {"enable_thinking": False}},
        "teacher": {"model": "lab:unreachable/teacher"},
        "data": {"train": "lab:unreachable/train"},
        "prompts": {"closing": str(tmp_path / "closing.jinja")},
    }
    folder = tmp_path / "run"
    make_tiny(folder / "final", vocab_size=512, max_position_embeddings=4096)
    (folder / "recipe.yaml").write_text(dump_yaml(recipe))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '<think>' if enable_thinking else 'so: ' }}"
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "final")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("below", ["", "final"])
def test_a_run_is_asked_in_the_words_that_it_was_trained_with(
    below: str, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its closing instruction and the arguments of its chat template; others are refused in the same folder."""
    out = tmp_path / "out"
    with scripted(right, "evaluated") as model, scripted(fair, "j") as judge:
        standing_in(monkeypatch, model)
        arguments = command(str(run / below), judge, data, out, "CEval")
        assert cli.main(arguments) == 0
        for body in model.requests:
            assert said(body).endswith("Answer in \\boxed{}, like a pirate.")
            assert body["chat_template_kwargs"] == {"enable_thinking": False}
        settings = results(out)["settings"]
        assert settings["closing"] == "Answer in \\boxed{}, like a pirate." and settings["think_open"] is False
        assert cli.main([*arguments, "--template-args", "{enable_thinking: true}"]) == 2
        assert "template_args = {'enable_thinking': False}" in capsys.readouterr().err
        (tmp_path / "mine.jinja").write_text("Only \\boxed{}.")
        mine = ["--closing", str(tmp_path / "mine.jinja"), "--template-args", "{enable_thinking: true}"]
        assert cli.main([*arguments, *mine[:2]]) == 2
        assert "was made with closing = " in capsys.readouterr().err
        assert cli.main([*command(str(run / below), judge, data, tmp_path / "other", "CEval"), *mine]) == 0
        assert said(model.requests[-1]).endswith("Only \\boxed{}.")
        assert results(tmp_path / "other")["settings"]["think_open"] is True  # with these arguments the template opens the block
        (tmp_path / "closing.jinja").unlink()
        assert cli.main(arguments) == 2
        assert "closing.jinja, which is gone: name its file with --closing" in " ".join(capsys.readouterr().err.split())


def test_whose_words_a_checkpoint_is_asked_in(run: Path, tmp_path: Path) -> None:
    """Those of the run that it lies in; a recipe that happens to lie about says nothing."""

    def words(place: Path, **given: Any) -> tuple[str | None, Any]:
        found = with_words_of_run(EvalOptions("m", "paper", **given), place)
        return found.closing.name if found.closing else None, found.template_args

    trained = ("closing.jinja", {"enable_thinking": False})
    assert words(run / "final") == words(run / "checkpoints" / "step-000010" / "model") == trained
    assert words(run / "final", template_args={}) == ("closing.jinja", {})
    assert words(run / "models" / "other") == words(tmp_path / "final") == (None, {})


@pytest.mark.parametrize("place", [True, False])
@pytest.mark.parametrize(("closing", "read"), [("answer-line", "line"), ("boxed", "after-thoughts"), (None, "after-thoughts")])
def test_answers_are_read_where_a_named_closing_puts_them(closing: str | None, read: str, place: bool, run: Path) -> None:
    """With and without a run's recipe beside the checkpoint, as for a server."""
    options = EvalOptions("m", "paper", closing=Path(closing) if closing else None)
    assert with_words_of_run(options, run / "final" if place else None).answer_from == read


def test_a_run_that_answers_in_a_line_is_read_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("student: {model: m}\ndata: {train: q}\nmethod: grpo\nprompts: {closing: answer-line}\n")
    own = with_words_of_run(EvalOptions("m", "paper"), tmp_path / "run" / "final")
    other = with_words_of_run(EvalOptions("m", "paper", closing=Path("boxed")), tmp_path / "run" / "final")
    assert (own.answer_from, other.answer_from) == ("line", "after-thoughts")


@pytest.mark.slow
def test_a_checkpoint_in_the_middle_of_a_run_is_evaluated_with_the_runs_tokenizer(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is weights alone; with LoRA adapters alone, and then it says so."""
    step, out = run / "checkpoints" / "step-000010", tmp_path / "out"
    (step / "model").mkdir(parents=True)
    for path in Path(model_folder("lab:unreachable/student")).iterdir():
        if path.name in ("config.json", "model.safetensors"):
            (step / "model" / path.name).write_bytes(path.read_bytes())
    command = ["eval", str(step), "--suite", "AIME25", "--data", str(data), "--output", str(out), "--max-tokens", "4"]
    assert cli.main(command) == 0, capsys.readouterr()
    state = results(out)
    assert state["label"] == str(step / "model") and state["benchmarks"][0]["tokens_out"] > 0
    assert state["settings"]["closing"] == "Answer in \\boxed{}, like a pirate."
    assert {path.name for path in (step / "model").iterdir()} == {"config.json", "model.safetensors"}
    assert cli.main(command) == 0 and "nothing is asked" in capsys.readouterr().out
    (step / "model" / "config.json").rename(step / "model" / "adapter_config.json")
    assert cli.main([*command[:-4], "--output", str(tmp_path / "other")]) == 2
    assert "holds adapters alone; final/ of its run has them" in " ".join(capsys.readouterr().err.split())


def standing_in(monkeypatch: pytest.MonkeyPatch, model: Scripted) -> None:
    """Checkpoints are served by this server."""

    @contextmanager
    def served(*arguments: Any, **options: Any) -> Iterator[Server]:
        yield Server((model.url,), "", "zppo")

    monkeypatch.setattr("zppo.evals.evaluate.served", served)


@pytest.mark.slow
def test_a_urls_words_come_from_flags(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("Only \\boxed{}.")
    with scripted(right, "m") as model, scripted(fair, "j") as judge:
        flags = ["--closing", str(tmp_path / "mine.jinja"), "--template-args", "{enable_thinking: true}"]
        assert cli.main(command(model.url, judge, data, tmp_path / "out", "CEval", *flags)) == 0
        assert {said(body).rpartition("\n")[2] for body in model.requests} == {"Only \\boxed{}."}
        assert all(body["chat_template_kwargs"] == {"enable_thinking": True} for body in model.requests)


@pytest.mark.slow
def test_a_server_whose_prompts_open_a_think_block_is_noticed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By replies that close what they did not open; a reply that was cut in its thoughts then names no answer, in benchmarks before too."""

    cut_off = {"程序法"}

    def thinks(body: dict[str, Any]) -> Reply:
        if any(words in said(body) for words in cut_off):
            return {"content": r"Perhaps \boxed{C}, or \boxed{A}? Let me see", "finish": "length"}
        return r"Every cat is one. </think> \boxed{A}"

    with scripted(thinks, "m") as model, scripted(lambda body: '{"verdict": "wrong"}', "j") as judge:
        arguments = command(model.url, judge, data, tmp_path, "CEval", "--concurrency", "1")
        assert cli.main(arguments) == 0
        assert len(model.requests) == 2 and "prompts open a think block: 1 of 1" in " ".join(capsys.readouterr().out.split())
        cut, whole = rows(tmp_path, "CEval")
        assert (cut["answer"], cut["boxless"], cut["by"]) == (None, True, "judge") and whole["answer"] == "A"
        assert results(tmp_path)["settings"]["think_open"] is True
        assert cli.main(arguments) == 0  # the same command goes on with what it found
        # The second benchmark shows it, and the first one is decided anew.
        cut_off.add("猫")
        arguments = command(model.url, judge, data, tmp_path / "two", "CEval,GPQA-D", "--concurrency", "1")
        assert cli.main(arguments) == 0 and len(model.requests) == 6
        assert [row["answer"] for row in rows(tmp_path / "two", "CEval")] == [None, None]
        assert [each["by_judge"] for each in results(tmp_path / "two")["benchmarks"]] == [2, 0]


@pytest.mark.slow
def test_a_stray_tag_is_no_open_think_block(data: Path, tmp_path: Path) -> None:
    """One of ten replies closes a block that it did not open; replies with thoughts apart, or a whole block, are none of these."""
    odd: Iterator[Any] = iter(
        ["so </think> \\boxed{A}", {"content": "\\boxed{A}", "reasoning_content": "hm"}, "<think>hm</think> \\boxed{A}"]
    )
    with scripted(lambda body: next(odd, r"\boxed{A}"), "m") as model, scripted(fair, "j") as judge:
        assert cli.main(command(model.url, judge, data, tmp_path, "CharXiv", "--concurrency", "1")) == 0
        assert len(model.requests) == 10
    assert results(tmp_path)["settings"]["think_open"] is False
    assert {row["answer"] for row in rows(tmp_path, "CharXiv")} == {"A"}


# --- how much is asked --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_benchmarks_are_sampled_as_often_as_is_said_of_each(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first problem's answer is 70: the model gives it in one of four samples, and 71 in three; the second's always."""
    tries = iter(range(100))

    def guesses(body: dict[str, Any]) -> Reply:
        if "prime" in said(body):
            return r"\boxed{25}"
        return r"\boxed{70}" if "integer bases" in said(body) and next(tries) == 0 else r"\boxed{71}"

    with scripted(guesses, "m") as model, scripted(fair, "j") as judge:
        arguments = command(model.url, judge, data, tmp_path, "AIME25,AIME26,CEval", "--samples", "AIME25=4,CEval=1,2")
        assert cli.main(arguments) == 0
        assert len(model.requests) == 2 * (4 + 2 + 1)
        assert cli.main(arguments) == 0 and len(model.requests) == 14
    parts = {each["name"]: each for each in results(tmp_path)["benchmarks"]}
    assert {name: part["samples"] for name, part in parts.items()} == {"AIME25": 4, "AIME26": 2, "CEval": 1}
    at_k = parts["AIME25"]["at_k"]
    assert (at_k["k"], at_k["avg"], at_k["pass"], at_k["maj"]) == (4, 0.625, 1.0, 0.5) and parts["AIME25"]["value"] == 0.625
    assert at_k["avg_error"] == parts["AIME25"]["error"] == pytest.approx(0.375)
    assert parts["CEval"]["at_k"] is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "score ± by box k pass@k maj@k rows" in printed and "AIME25 62.5 37.5 62.5 4 100.0 50.0 8 8 0" in printed


@pytest.mark.slow
def test_a_larger_limit_asks_for_what_is_new_alone(data: Path, tmp_path: Path) -> None:
    with scripted(right, "m") as model, scripted(fair, "j") as judge:
        for limit, asked in (("1", 1), ("4", 4), ("4", 4), ("1000", 10)):
            assert cli.main(command(model.url, judge, data, tmp_path, "CharXiv", "--limit", limit)) == 0
            assert len(model.requests) == asked


# --- servers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_work_is_spread_over_addresses_and_one_that_fails_is_left_for_the_others(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four addresses one is not there, and one starts to fail after its first answer."""
    asked = threading.Event(), threading.Event()

    def together(which: int) -> Callable[[dict[str, Any]], Reply]:
        def reply(body: dict[str, Any]) -> Reply:
            asked[which].set()
            asked[1 - which].wait(60)  # none of them has answered before each was asked
            return right(body)

        return reply

    with scripted(together(0), "m") as one, scripted(together(1), "m") as two, scripted(fair, "j") as judge:
        one.context, two.context = 90_000, 20_000
        urls = f"{one.url}, {two.url},http://127.0.0.1:1/v1"
        assert cli.main(command(urls, f"{judge.url},http://127.0.0.1:1/v1", data, tmp_path / "out", "CharXiv")) == 0
        assert len(one.requests) + len(two.requests) == 10 and one.requests and two.requests
        assert "127.0.0.1:1/v1" in (printed := capsys.readouterr().out) and printed.count("it goes on without this address") == 2
        two.context = 1000
        assert cli.main(command(urls, judge, data, tmp_path / "short", "CharXiv")) == 2  # the shortest context counts
    out = tmp_path / "failing"
    with scripted(right, "m") as one, scripted(lambda body: 500, "m") as two, scripted(fair, "j") as judge:
        assert cli.main(command(f"{two.url},{one.url}", judge, data, out, "CharXiv,CEval")) == 0
        assert len(one.requests) == 12 and 0 < len(two.requests) <= 12
    assert [each["open"] for each in results(out)["benchmarks"]] == [0, 0]


@pytest.mark.slow
def test_an_address_is_given_up_after_failures_in_a_row(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zppo.evals import task

    monkeypatch.setattr(task, "DOWN_AFTER", 2)
    with scripted(right, "m") as one, scripted(lambda body: 503, "m") as two, scripted(fair, "j") as judge:
        urls = f"{two.url},{one.url}"
        assert cli.main(command(urls, judge, data, tmp_path, "CharXiv", "--concurrency", "1")) == 0
        assert (len(two.requests), len(one.requests)) == (2, 10)
        printed = " ".join(capsys.readouterr().out.split())
        assert f"{two.url} did not answer any more (Error code: 503" in printed and "the others took its share" in printed


STAND_IN = """
import json, sys, http.server
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send({"data": [{"id": "evaluated", "max_model_len": 20000, "argv": sys.argv[1:]}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        words = " ".join(sys.argv[1:]) + " frames " + str(str(body["messages"]).count("data:image"))
        message = {"role": "assistant", "content": words + r" \\\\boxed{A}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        self.send({"id": "1", "object": "chat.completion", "created": 1, "model": "evaluated", "choices": [choice]})
    def send(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
    def log_message(self, *more):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(arguments["--port"])), Answer).serve_forever()
"""


@pytest.mark.slow
def test_vllms_arguments_reach_the_one_that_is_started_and_clips_are_frames_there_too(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package of that name, whose server repeats how it was called."""
    package = tmp_path / "stand-in" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(STAND_IN.replace("\\\\\\\\", "\\\\"))
    monkeypatch.setenv("PYTHONPATH", f"{package.parents[2]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr("zppo.evals.evaluate.has_vllm", lambda: True)
    monkeypatch.setattr("zppo.evals.endpoint.has_vllm", lambda: True)
    out = tmp_path / "out"
    with scripted(fair, "j") as judge:
        arguments = command(str(run), judge, data, out, "VMME")
        mine = ["--vllm.max-model-len=20000", "--vllm.tensor-parallel-size=2", "--vllm.enforce-eager", "--vllm.quantization=fp8"]
        assert cli.main([*arguments, *mine]) == 0
        texts = [row["text"] for row in rows(out, "VMME")]
        wanted = "--max-model-len=20000 --tensor-parallel-size=2 --enforce-eager --quantization=fp8"
        assert len(texts) == 2 and all(wanted in text and " --port " in text for text in texts)
        assert sorted(text.partition("frames ")[2].split()[0] for text in texts) == ["16", "3"]
        assert "clips as 16 pictures" in capsys.readouterr().out
        assert results(out)["settings"]["vllm"] == {"quantization": "fp8"} and results(out)["settings"]["video"] == "frames"
        assert cli.main([*arguments, "--vllm.quantization=fp8"]) == 0  # how the machine is used may change
        assert cli.main(arguments) == 2
        assert "was made with vllm = {'quantization': 'fp8'}" in " ".join(capsys.readouterr().err.split())
        assert cli.main([*arguments, *mine, "--video", "file", "--output", str(tmp_path / "whole")]) == 0
        assert "clips whole" in capsys.readouterr().out
    monkeypatch.setattr("zppo.evals.evaluate.has_vllm", lambda: False)
    assert cli.main([*arguments, "--vllm.enforce-eager"]) == 2
    assert "--vllm.enforce-eager is for the vLLM that zppo starts for a folder, and vLLM is not installed" in capsys.readouterr().err
