"""Chat templates, special tokens, think blocks: on tiny byte-level tokenizers made on the spot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from zppo.core.types import Message
from zppo.engines.chat import Chat
from zppo.errors import ModelError

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('the system turn comes first') }}{% endif %}"
    "<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n"
    "{% if thinking | default(false) %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ASK = (Message("user", "1 + 1 = ?"),)


def make(template: str | None = TEMPLATE, think_special: bool = False, bos: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: every text survives encode and decode."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|end|>", "<|turn|>", "<|image_pad|>", "<bos>"])
    raw.add_tokens([AddedToken(t, special=think_special, normalized=False) for t in ("<think>", "</think>")])
    raw.add_tokens(["<tool_call>", "\n\n\n", "hello"])
    if bos:
        from tokenizers.processors import TemplateProcessing

        raw.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", bos_token=bos, chat_template=template)


def model(**fields: Any) -> PreTrainedModel:
    """What `Chat` looks at of a model."""
    generation = GenerationConfig(eos_token_id=fields.pop("eos", None))
    return cast(PreTrainedModel, SimpleNamespace(generation_config=generation, config=Qwen3Config(**fields)))


def text(chat: Chat, ids: tuple[int, ...]) -> str:
    return str(chat.tokenizer.decode(list(ids)))


def test_prompts_go_through_the_template_with_its_arguments() -> None:
    conversation = (Message("system", "Be brief."), *ASK, Message("assistant", "2"), Message("user", "And 2 + 2?"))
    chat = Chat(make(), {"thinking": True})
    assert text(chat, chat.encode(conversation)) == (
        "<|turn|>system\nBe brief.<|end|>\n<|turn|>user\n1 + 1 = ?<|end|>\n<|turn|>assistant\n2<|end|>\n"
        "<|turn|>user\nAnd 2 + 2?<|end|>\n<|turn|>assistant\n<think>\n"
    )
    assert chat.encode(ASK).count(chat.tokenizer.convert_tokens_to_ids("<|turn|>")) == 2, "control tokens are one id each"


def test_a_template_of_ones_own_takes_the_tokenizers_place() -> None:
    chat = Chat(make(), template="{{ messages[0].content }} ->")
    assert text(chat, chat.encode(ASK)) == "1 + 1 = ? ->"


def test_base_models_get_plain_text() -> None:
    chat = Chat(make(template=None))
    assert text(chat, chat.encode((Message("system", "Sums."), *ASK))) == "Sums.\n\n1 + 1 = ?\n"
    with_bos = Chat(make(template=None, bos="<bos>"))
    ids = with_bos.encode(ASK)
    assert text(with_bos, ids) == "<bos>1 + 1 = ?\n"
    with pytest.raises(ModelError, match="empty prompt"):
        Chat(make(), template="{{ '' }}").encode(ASK)


@pytest.mark.parametrize("special", [False, True])
def test_think_open_looks_at_the_models_own_turn(special: bool) -> None:
    opened, closed = (Chat(make(think_special=special), {"thinking": thinking}) for thinking in (True, False))
    assert opened.think_open(opened.encode(ASK))
    assert not closed.think_open(closed.encode(ASK))
    # A question that speaks of the tags opens nothing, and closes nothing.
    assert not closed.think_open(closed.encode((Message("user", "What does <think> mean?"),)))
    assert opened.think_open(opened.encode((Message("user", "What does </think> mean?"),)))
    forced = tuple(opened.tokenizer("so</think>")["input_ids"])
    assert not opened.think_open(opened.encode(ASK) + forced)
    bare = Chat(make(template=None, think_special=special))
    assert not bare.think_open(bare.encode((Message("user", "Reason inside <think> </think>."),)))


@pytest.mark.parametrize("special", [False, True])
def test_decoding_keeps_think_tags_and_leaves_control_tokens_out(special: bool) -> None:
    chat = Chat(make(think_special=special))
    written = "<think>\n 1 , 2</think>\\boxed{ü 2}<tool_call>"
    ids = chat.tokenizer(f"<|turn|>{written}<|end|>")["input_ids"]
    assert chat.decode(ids) == written


def test_special_texts_are_the_control_tokens_longest_first() -> None:
    texts = Chat(make()).special_texts
    assert set(texts) == {"<|end|>", "<|turn|>", "<|image_pad|>", "<bos>", "<think>", "</think>", "<tool_call>"}
    assert [len(t) for t in texts] == sorted((len(t) for t in texts), reverse=True)


def test_end_tokens_come_from_the_model_and_the_tokenizer() -> None:
    chat = Chat(make())
    end = chat.tokenizer.eos_token_id
    assert chat.eos_ids(model()) == {end}
    assert chat.eos_ids(model(eos=3)) == {3, end}
    assert chat.eos_ids(model(eos=[3, 4])) == {3, 4, end}
    chat.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end token"):
        chat.eos_ids(model())


def test_padding_is_any_known_id() -> None:
    chat = Chat(make())
    assert chat.pad_id(model(eos=[9])) == 9
    chat.tokenizer.pad_token = "<bos>"
    assert chat.pad_id(model()) == chat.tokenizer.convert_tokens_to_ids("<bos>")


def test_image_tokens_are_banned() -> None:
    chat = Chat(make())
    image = chat.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert chat.banned_ids(model()) == {image}
    assert chat.banned_ids(model(image_token_id=5, vision_start_token_id=6, video_token_id=None), [8]) == {image, 5, 6, 8}


def test_broken_templates_and_refused_roles_are_named() -> None:
    with pytest.raises(ModelError, match="cannot render"):
        Chat(make("{{ messages[0].content"))
    with pytest.raises(ModelError, match="cannot render"):
        Chat(make("{{ nothing.at_all }}"))
    with pytest.raises(ModelError, match="roles user, system: the system turn comes first"):
        Chat(make()).encode((*ASK, Message("system", "Too late.")))


def test_loading(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "good")
    chat = Chat.load(str(tmp_path / "good"), {"thinking": True})
    assert chat.encode(ASK) == Chat(make(), {"thinking": True}).encode(ASK)
    with pytest.raises(ModelError, match="cannot load the tokenizer of"):
        Chat.load(str(tmp_path / "missing"))
