"""Asks public harnesses for their verdicts on the answers in `data/evaluate/harness.json`, and writes these there.

`test_evaluate_harness.py` puts the same answers to our scorers. Run this by hand, in an environment of its own, since the harnesses bring
some hundred packages and pin others; to add an answer, write it into the file first:

    pip install --no-deps lmms-eval inspect-evals anls
    pip install inspect-ai aiohttp evaluate latex2sympy2 apted distance zss lxml editdistance Levenshtein sacrebleu loguru \
        jieba nltk Polygon3 rapidfuzz pandas
    python tests/make_harness_verdicts.py

Of lmms-eval only single modules are imported, past the packages that would load every task.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import random
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "data" / "evaluate" / "harness.json"

Case = dict[str, Any]


def load_stubs() -> None:
    """Empty packages in place of those whose `__init__` imports all tasks."""
    spec = importlib.util.find_spec("lmms_eval")
    assert spec is not None and spec.submodule_search_locations
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in ("", ".tasks", ".tasks._task_utils", ".api"):
        module = types.ModuleType(f"lmms_eval{name}")
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[module.__name__] = module


def choice(case: Case) -> float | None:
    """None where the letter was drawn: another seed gives another one."""
    from lmms_eval.tasks._task_utils.mmmu_mcq_utils import parse_mmmu_multi_choice_response as parse

    letters = list("ABCD")
    found = []
    for seed in (0, 5):
        random.seed(seed)
        found.append(parse(case["answer"], letters, dict(zip(letters, case["options"], strict=True))))
    return float(found[0] == case["gold"]) if found[0] == found[1] else None


def mvbench(case: Case) -> float:
    from lmms_eval.tasks.mvbench.utils import mcq_acc

    return float(mcq_acc(case["gold"], case["answer"]))


def aime(case: Case) -> float:
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Target
    from inspect_ai.solver import TaskState
    from inspect_evals.utils.aime_common import aime_scorer

    output = ModelOutput.from_content("none", f"So it is\n\\boxed{{{case['answer']}}}")
    state = TaskState(model="none/none", sample_id=1, epoch=1, input="", messages=[], output=output)  # type: ignore[arg-type]
    verdict = asyncio.run(aime_scorer()(state, Target(case["gold"])))
    return float(verdict.value == "C")


def mathvista(case: Case) -> float:
    from lmms_eval.tasks.mathvista.mathvista_evals import MathVistaEvaluator

    judge = MathVistaEvaluator.__new__(MathVistaEvaluator)  # its constructor wants a server
    kind = "float" if case["places"] else "integer"
    found = judge.normalize_extracted_answer(case["answer"], [], "free_form", kind, case["places"])
    return float(judge.safe_equal(found, case["gold"]))


def mathvision(case: Case) -> float:
    from lmms_eval.tasks.mathvision.eval_utils import is_equal

    return float(is_equal(case["answer"], case["gold"]))


def lmms_anls(case: Case) -> float:
    from lmms_eval.api.metrics import anls

    return float(anls(case["golds"], [case["answer"]])["anls"])


def anls_package(case: Case) -> float:
    from anls import anls_score

    return float(anls_score(case["answer"], case["golds"]))


def mmvet(case: Case) -> float:
    import lmms_eval.tasks.mmvet.utils as harness

    harness.get_chat_response = lambda *args, **kwargs: (case["grade"], "judge")
    row = {"question": "?", "answer": "-1 <AND> -5", "question_id": "v1_0", "capability": "math"}
    return float(harness.mmvet_process_results(row, ["x = -1"])["gpt_eval_score"]["score"])


def blind(case: Case) -> float:
    from lmms_eval.tasks.vlmsareblind.utils import vlmsareblind_process_results as judge

    return float(judge({"task": case["task"], "groundtruth": case["gold"]}, [case["answer"]])["accuracy"])


def ocr(case: Case) -> float:
    from lmms_eval.tasks.ocrbench_v2.utils import ocrbench_v2_process_results as judge
    from nltk.corpus import wordnet

    wordnet.synsets = lambda word: []  # METEOR without a download: words and stems, no synonyms
    row = json.loads(json.dumps(case))  # it changes what it is given
    return float(judge(row, [case["answer"]])["ocrbench_v2_accuracy"]["score"])


def wemath(case: Case) -> dict[str, int]:
    import pandas as pd
    from lmms_eval.tasks.wemath.wemath_utils import calculate_metrics, compute_final_scores, process_steps_data

    table = pd.DataFrame(case["rows"])
    metrics = calculate_metrics(process_steps_data(table, 2), process_steps_data(table, 3))
    counts, _ = compute_final_scores(metrics, case["of"])
    return {name: int(count) for name, count in counts.items()}


GROUPS: dict[str, tuple[str, str, Callable[[Case], Any]]] = {
    "choice": ("lmms-eval", "MMMU-Pro", choice),
    "choice, MVBench": ("lmms-eval", "MVBench", mvbench),
    "number": ("inspect-evals", "AIME", aime),
    "precision": ("lmms-eval", "MathVista", mathvista),
    "text": ("lmms-eval", "MathVision", mathvision),
    "anls": ("lmms-eval", "InfographicVQA", lmms_anls),
    "anls, package": ("anls", "ANLS", anls_package),
    "graded": ("lmms-eval", "MM-Vet", mmvet),
    "blind": ("lmms-eval", "VLMs-are-Blind", blind),
    "ocr": ("lmms-eval", "OCRBench v2", ocr),
    "wemath": ("lmms-eval", "We-Math", wemath),
}

if __name__ == "__main__":
    os.environ.setdefault("OPENAI_API_KEY", "none")  # asked for at import, never used
    load_stubs()
    found = json.loads(OUT.read_text(encoding="utf-8"))
    for name, (package, title, verdict) in GROUPS.items():
        found[name]["harness"] = f"{package} {importlib.metadata.version(package)}, {title}"
        for each in found[name]["cases"]:
            each["theirs"] = verdict(each)
    lines = []
    for name, group in found.items():
        cases = ",\n  ".join(json.dumps(each, ensure_ascii=False) for each in group["cases"])
        lines.append(f'{json.dumps(name)}: {{"harness": {json.dumps(group["harness"])}, "cases": [\n  {cases}]}}')
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print({name: len(group["cases"]) for name, group in found.items()})
