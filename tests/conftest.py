"""What every test shares: one thread, no network, and tiny random models made on the spot."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import time

# Before anything else is imported: tests see the same environment everywhere, whoever starts them, and so do the processes they start.
FOREIGN = (
    "ACCELERATE_", "CLICOLOR", "CUBLAS_", "FORCE_COLOR", "FSDP_", "GITHUB_", "HF_", "HUGGING", "LC_", "MLFLOW_", "NO_COLOR", "OPENAI_",
    "PARALLELISM_CONFIG_", "SSL_", "TRACKIO_", "TRANSFORMERS_", "TTY_", "VLLM_", "WANDB_",
)  # fmt: skip
FOREIGN_NAMES = (
    "ALL_PROXY CI FTP_PROXY HTTPS_PROXY HTTP_PROXY LANG LANGUAGE LINES LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT NO_PROXY "
    "RANK REQUESTS_CA_BUNDLE WORLD_SIZE XDG_CACHE_HOME ZPPO_CACHE"
).split()
for name in list(os.environ):
    if name.startswith(FOREIGN) or name.upper() in FOREIGN_NAMES:
        del os.environ[name]
os.environ.update(
    {
        "COLUMNS": "1000",  # no line is broken, however long the temporary folder's path is
        "HF_HUB_OFFLINE": "1",  # no test needs a network
        "LC_ALL": "C.UTF-8",
        "OMP_NUM_THREADS": "1",  # small tests gain nothing from threads
        "PYTHONUTF8": "1",
        "TERM": "xterm",
        "TOKENIZERS_PARALLELISM": "false",
        "TZ": "UTC",
    }
)
time.tzset()
if sys.dont_write_bytecode and not sys.pycache_prefix:
    # No compiled modules beside the sources: kept elsewhere, or each of many processes would compile torch again.
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.path.join(tempfile.gettempdir(), f"zppo-tests-{os.getuid()}")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from starlette.testclient import TestClient
    from transformers import PreTrainedTokenizerFast

    from chromium import Browser
    from serving import Counting
    from victims import Victims
    from zppo.engines.chat import Chat

# Shared cores make a deadline per example a coin toss, and new examples in every run would make passing one: `make fuzz` draws new ones.
settings.register_profile("zppo", deadline=None, max_examples=50, derandomize="ZPPO_FUZZ_EXAMPLES" not in os.environ)
settings.load_profile("zppo")


@pytest.fixture(autouse=True)
def fresh_precision() -> Iterator[None]:
    """A run in bf16 leaves its precision to its process, and another one there could not have its own."""
    yield
    if accelerate := sys.modules.get("accelerate.state"):
        state: Any = accelerate.AcceleratorState
        if state._shared_state.get("_mixed_precision", "no") != "no":
            state._reset_state(True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """pytest's own lines are as wide as the terminal, whatever COLUMNS says."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        columns = os.environ.pop("COLUMNS")
        reporter._tw.fullwidth = reporter._screen_width = shutil.get_terminal_size().columns
        os.environ["COLUMNS"] = columns


def pytest_collection_finish() -> None:
    """Collecting garbage does not walk through all that was imported, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def signals() -> Iterator[None]:
    """What signals do in a program that was started in a terminal: jobs in the background are started with some of them ignored."""
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
        signal.SIGCHLD: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, usual)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for number, handler in before.items():
        signal.signal(number, handler)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}{% endif %}"
)
MERGE_TEXT = (
    "What is 3 plus 4? Reason first inside the think tags, then give the final answer in the box.",
    "One candidate is correct and the other one is wrong; use them as references for solving the problem.",
    "All of these answers are wrong. The question is hard. Write at most five lines and keep the essential steps.",
    "user assistant system response summary candidate 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
)


def make_tokenizer(merges: int = 150) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (any text survives encode and decode) with a chat template and about 260 + `merges` tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        MERGE_TEXT,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + len(specials) + merges, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def make_tiny(path: Path, seed: int = 0, std: float = 0.1, merges: int = 150, **config: Any) -> Path:
    """Write a tiny random Qwen3 checkpoint with tokenizer to `path` and return it.

    Weights have the standard deviation `std` (small ones hide errors); `config` overrides fields of its `Qwen3Config`.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer(merges)
    fields: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "initializer_range": std,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**{**fields, **config}))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_qwen3_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 checkpoint with tokenizer, seed 0; read only."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "qwen3")


@pytest.fixture(scope="session")
def victims() -> Iterator[Victims]:
    """Runs the command line in forked children; see tests/victims.py."""
    from victims import Victims

    made = Victims()
    yield made
    made.close()


REWARD = '''
import hashlib

def reward(completion, question):
    """A random model never boxes an answer, so one text in five counts as right, and a number of the text as its answer."""
    digest = hashlib.sha256((completion + question.id).encode("utf-8", "surrogatepass")).digest()[0]
    return {"correct": digest % 5 == 0, "reward": float(digest % 5 == 0), "answer": str(digest)}
'''


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on 20 questions, a random student and a random teacher: 5 steps with evaluations and checkpoints."""
    import yaml

    folder = tmp_path_factory.mktemp("recipe")
    make_tiny(folder / "student", seed=0)
    make_tiny(folder / "teacher", seed=1)
    rows = [{"prompt": f"What is {i} plus {j}?", "answer": i + j, "level": "ab"[i % 2]} for i in range(5) for j in range(4)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    settings = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher", "rollout": {"max_new_tokens": 6}, "compression": {"max_new_tokens": 12}},
        "data": {"train": "questions.jsonl", "eval": "questions.jsonl", "eval_limit": 6},
        "rollout": {"batch_size": 8, "group_size": 4, "max_new_tokens": 12},
        "zone": {"rho_aug": 0.5},
        "eval": {"max_new_tokens": 12, "every": 2},
        "train": {"steps": 5, "checkpoint_every": 2, "learning_rate": 1e-3, "device": "cpu"},
        "grading": {"reward": "reward.py:reward"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "recipe.yaml"


# `served`, `engine`, `chat` and `client` are the tiny server of the tests of `zppo serve` (tests/serving.py).
@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counting, Chat]:
    from serving import make_served

    return make_served(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def engine(served: tuple[Counting, Chat]) -> Counting:
    return served[0]


@pytest.fixture(scope="module")
def chat(served: tuple[Counting, Chat]) -> Chat:
    return served[1]


@pytest.fixture(scope="module")
def client(engine: Counting, chat: Chat) -> Iterator[TestClient]:
    from serving import connected

    with connected(engine, chat) as client:
        yield client


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    from chromium import Browser

    with Browser() as browser:
        yield browser


@pytest.fixture
def browser(shared_browser: Browser) -> Iterator[Browser]:
    """A window of a desktop's size; whatever a test does, nothing may fail in it."""
    shared_browser.call("Page.navigate", url="about:blank")  # the page of the test before may still ask its server, which is gone
    shared_browser.until("location.href === 'about:blank'")
    shared_browser.errors.clear()
    shared_browser.requests.clear()
    shared_browser.size(1280, 900)
    yield shared_browser
    assert shared_browser.errors == []
