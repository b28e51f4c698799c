"""The registry: a row per benchmark of the paper (16 of images, 10 of language, 5 of video), and how rows are looked up."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from zppo.errors import SettingsError
from zppo.evals.adapters import choice, documents, maths, video
from zppo.evals.adapters.own import is_own, own_benchmark
from zppo.evals.benchmark import MODES, Benchmark, ClipFiles, Family, HubDataset, Judge

_OCRBENCH_DIFFERS = (
    "The whole reply is scored, here the boxed answer or, without a box, what follows the thinking; text spotting is matched without "
    "the original's rules for words that do not count."
)

VISION = (
    Benchmark(
        "AI2D", "AI2 Diagrams", "vlm", HubDataset("lmms-lab/ai2d", ("test",)), choice.ai2d,
        differs="A letter alone is asked for and matched exactly.",
        rows=3088, also=(HubDataset("lmms-lab-encoder/ai2d", ("test",)),),
    ),
    Benchmark(
        "BabyV", "BabyVision", "vlm", HubDataset("UnipatAI/BabyVision", ("train",)), choice.babyvision,
        differs="A judge compares every answer, letters too.",
        rows=388, licence="mit",
    ),
    Benchmark(
        "CharXiv", "CharXiv, validation", "vlm", HubDataset("princeton-nlp/CharXiv", ("validation",)), documents.charxiv,
        differs="The 19 questions about what is drawn have other, fixed words, all say how to write the answer, and a named model judges "
        "five at a time.",
        judge="eval_charxiv", rows=5000, licence="cc-by-sa-4.0",
        unverified="whether the paper asks the 1,000 reasoning questions, the 4,000 descriptive ones, or all: all are averaged here",
    ),
    Benchmark(
        "DynaM", "DynaMath, 501 questions in 10 variants", "vlm",
        HubDataset("DynaMath/DynaMath_Sample", tuple(f"sample_variant{i}" for i in range(1, 11))), maths.dynamath,
        differs="The answer is asked for in JSON with three decimals, and average and worst case are both reported.",
        aggregate="worst case", rows=5010, licence="apache-2.0", also=(HubDataset("kcz358/DynaMath", ("test",)),),
        unverified="which of the two figures the paper shows: worst case is taken here, the average is reported beside it",
    ),
    Benchmark(
        "EmbSp", "EmbSpatial-Bench", "vlm", HubDataset("FlagEval/EmbSpatial-Bench", ("test",)), choice.embspatial,
        differs="Models without chat are scored by the likelihood of the options.",
        rows=3640,
    ),
    Benchmark(
        "InfoVQA", "InfographicVQA, validation", "vlm",
        HubDataset("lmms-lab/DocVQA", ("validation",), ("InfographicVQA",)), documents.infovqa,
        differs="The whole reply, asked for as a word or a phrase, is compared; here the boxed answer is.",
        judged=False, rows=2801, also=(HubDataset("lmms-lab-encoder/DocVQA", ("validation",), ("InfographicVQA",)),),
        unverified="whether the paper uses the validation split or sends the test split in",
    ),
    Benchmark(
        "MVerse", "MathVerse, testmini", "vlm", HubDataset("CaraJ/MathVerse-lmmseval", ("testmini",), ("testmini",)), maths.mathverse,
        differs="A named model extracts every answer and another call of it scores; the text-only version counts apart.",
        rows=3940, licence="mit",
    ),
    Benchmark(
        "MVision", "MathVision, test", "vlm", HubDataset("MathLLMs/MathVision", ("test",)), maths.mathvision,
        differs="Rules find the answer in the last sentences of the reply.",
        rows=3040, licence="mit",
        unverified="whether the paper uses test (3,040) or testmini (304)",
    ),
    Benchmark(
        "MVista", "MathVista, testmini", "vlm",
        HubDataset("AI4Math/MathVista", ("testmini",), revision="2b6ad69445fbb5695c9b165475e8decdbeb97747"), maths.mathvista,
        differs="A hint says how many decimals are wanted, a named model extracts the answer, and one that is no option becomes the most "
        "similar one.",
        rows=1000, licence="cc-by-sa-4.0",
    ),
    Benchmark(
        "MMMUPro", "MMMU-Pro, 3 configurations", "vlm",
        HubDataset("MMMU/MMMU_Pro", ("test",), ("standard (10 options)", "standard (4 options)", "vision")), choice.mmmu_pro,
        differs="The overall figure is the mean of ten options and vision alone; a letter that is not found is drawn at random.",
        rows=5190, licence="apache-2.0",
        unverified="whether the paper's three configurations are averaged by row, as here",
    ),
    Benchmark(
        "MM-Vet", "MM-Vet", "vlm", HubDataset("lmms-lab/MMVet", ("test",)), documents.mmvet,
        differs="GPT-4 grades with other worked examples, five times over.",
        judge="eval_mmvet", rows=218, also=(HubDataset("lmms-lab-encoder/MMVet", ("test",)),),
    ),
    Benchmark(
        "OCREN", "OCRBench v2, English", "vlm", HubDataset("ling99/OCRBench_v2", ("test",)), documents.ocrbench_en,
        differs=_OCRBENCH_DIFFERS,
        aggregate="abilities", judged=False, rows=7400, licence="mit",
        unverified="how the 10,000 rows share out over the two languages is from its paper",
    ),
    Benchmark(
        "OCRZH", "OCRBench v2, Chinese", "vlm", HubDataset("ling99/OCRBench_v2", ("test",)), documents.ocrbench_zh,
        differs=_OCRBENCH_DIFFERS,
        aggregate="abilities", judged=False, rows=2600, licence="mit",
        unverified="how the 10,000 rows share out over the two languages is from its paper",
    ),
    Benchmark(
        "VisP", "VisualPuzzles", "vlm", HubDataset("neulab/VisualPuzzles", ("train",)), choice.visual_puzzles,
        differs="The answer is asked for on the last line, as `Answer: letter`.",
        rows=1168, also=(HubDataset("neulab/VisualPuzzles", ("test",)),),
    ),
    Benchmark(
        "VBlind", "VLMs-are-Blind", "vlm", HubDataset("XAI/vlmsareblind", ("valid",)), documents.vlms_are_blind,
        differs="Answers are asked for in curly brackets and matched exactly.",
        aggregate="axes", rows=8016, licence="mit",
        unverified="whether the paper averages over its eight tasks, as here and in lmms-eval, or over rows",
    ),
    Benchmark(
        "WeMath", "We-Math, testmini", "vlm", HubDataset("We-Math/We-Math", ("testmini",)), maths.wemath,
        differs="The figure is a score of four kinds of mastery, strict or loose; here both stand beside the accuracy.",
        aggregate="wemath", rows=1740,
        unverified="which figure the paper shows: accuracy over all rows is taken here",
    ),
)  # fmt: skip


_MMLU_SUBJECTS = tuple(
    """abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry college_computer_science
    college_mathematics college_medicine college_physics computer_security conceptual_physics econometrics electrical_engineering
    elementary_mathematics formal_logic global_facts high_school_biology high_school_chemistry high_school_computer_science
    high_school_european_history high_school_geography high_school_government_and_politics high_school_macroeconomics
    high_school_mathematics high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality international_law jurisprudence logical_fallacies
    machine_learning management marketing medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations security_studies sociology
    us_foreign_policy virology world_religions""".split()
)
_CEVAL_SUBJECTS = tuple(
    """accountant advanced_mathematics art_studies basic_medicine business_administration chinese_language_and_literature civil_servant
    clinical_medicine college_chemistry college_economics college_physics college_programming computer_architecture computer_network
    discrete_mathematics education_science electrical_engineer environmental_impact_assessment_engineer fire_engineer
    high_school_biology high_school_chemistry high_school_chinese high_school_geography high_school_history high_school_mathematics
    high_school_physics high_school_politics ideological_and_moral_cultivation law legal_professional logic mao_zedong_thought marxism
    metrology_engineer middle_school_biology middle_school_chemistry middle_school_geography middle_school_history
    middle_school_mathematics middle_school_physics middle_school_politics modern_chinese_history operating_system physician
    plant_protection probability_and_statistics professional_tour_guide sports_science tax_accountant teacher_qualification
    urban_and_rural_planner veterinary_medicine""".split()
)

LANGUAGE = (
    Benchmark(
        "AIME25", "AIME 2025, I and II", "llm", HubDataset("opencompass/AIME2025", ("test",), ("AIME2025-I", "AIME2025-II")), maths.aime25,
        differs="A contest has no protocol for models; harnesses differ in how often they sample each of the 30 problems.",
        judged=False, rows=30, licence="mit",
        also=(HubDataset("math-ai/aime25", ("test",), revision="563bb8404243c5f09de6ec262f2db674fe5bce9b"),),
    ),
    Benchmark(
        "AIME26", "AIME 2026", "llm", HubDataset("MathArena/aime_2026", ("train",)), maths.aime26,
        differs="MathArena samples each problem four times and reports the mean.",
        judged=False, rows=30, licence="cc-by-nc-sa-4.0",
        also=(HubDataset("math-ai/aime26", ("test",), revision="79037aebdb6580008fb960d17cb21fd3099083e3"),),
    ),
    Benchmark(
        "CEval", "C-Eval, validation, 52 subjects", "llm", HubDataset("ceval/ceval-exam", ("val",), _CEVAL_SUBJECTS), choice.ceval,
        differs="Five worked examples stand before each question, the answer is the likeliest letter, and the test answers are not public.",
        rows=1346, licence="cc-by-nc-sa-4.0",
    ),
    Benchmark(
        "GPQA-D", "GPQA Diamond", "llm", HubDataset("Idavidrein/gpqa", ("train",), ("gpqa_diamond",)), choice.gpqa,
        differs="Each harness shuffles the options in a way of its own, and many ask every question several times.",
        rows=198, licence="cc-by-4.0", gated=True,
    ),
    Benchmark(
        "HLE", "Humanity's Last Exam", "llm",
        HubDataset("cais/hle", ("test",), revision="5a81a4c7271a2a2a312b9a690f0c2fde837e4c29"), choice.hle,
        differs="A system prompt asks for explanation, answer and confidence, a named model judges, and a calibration error is reported.",
        judge="eval_hle", rows=2500, licence="mit", gated=True,
        unverified="whether the paper keeps the questions with a picture; they are kept here",
    ),
    Benchmark(
        "IMO-AB", "IMO-AnswerBench", "llm", HubDataset("OpenEvals/IMO-AnswerBench", ("train",)), maths.imo_answerbench,
        differs="A named model with a long rubric grades every answer.",
        rows=400, licence="cc-by-4.0", also=(HubDataset("Hwilner/imo-answerbench", ("train",)),),
        unverified="fields, split and licence are those of the copy Hwilner/imo-answerbench",
    ),
    Benchmark(
        "MMLU", "MMLU, test", "llm", HubDataset("cais/mmlu", ("test",), ("all",), "c30699e8356da336a370243923dbaf21066bb9fe"), choice.mmlu,
        differs="Five worked examples stand before each question, and the answer is the likeliest letter.",
        rows=14042, licence="mit",
    ),
    Benchmark(
        "MMLU-Pro", "MMLU-Pro", "llm",
        HubDataset("TIGER-Lab/MMLU-Pro", ("test",), revision="527feea0afed1de15a8c115abf7be4c912123315"), choice.mmlu_pro,
        differs="Five worked examples with reasoning stand before each question; an answer that cannot be found is drawn at random.",
        rows=12032, licence="mit",
    ),
    Benchmark(
        "MMLU-Rd", "MMLU-Redux 2.0, 57 subjects", "llm",
        HubDataset("edinburgh-dawg/mmlu-redux-2.0", ("test",), _MMLU_SUBJECTS), choice.mmlu_redux,
        differs="Some harnesses keep rows that its annotators found faulty, with the corrected answer; here they are left out.",
        licence="cc-by-4.0",
        unverified="how many of the 5,700 rows have the error type ok; which of them the paper keeps",
    ),
    Benchmark(
        "MultiCh", "MultiChallenge", "llm", HubDataset("ScaleAI/MultiChallenge", ("test",)), choice.multichallenge,
        differs="The response is given without any instruction on its form, and a named model answers the target question.",
        judge="eval_multichallenge", aggregate="axes", rows=266, licence="cc-by-4.0",
        also=(HubDataset("nmayorga7/multichallenge", ("train",)),),
        unverified="its paper counts 273 conversations, the card 266",
    ),
)  # fmt: skip


_MVBENCH_TASKS = tuple(
    """action_antonym action_count action_localization action_prediction action_sequence character_order counterfactual_inference
    egocentric_navigation episodic_reasoning fine_grained_action fine_grained_pose moving_attribute moving_count moving_direction
    object_existence object_interaction object_shuffle scene_transition state_change unexpected_action""".split()
)

_VIDEO_MME = ClipFiles(
    ("videos_chunked_*.zip", "subtitle.zip"), "about 100 GB in 20 archives, and subtitles",
    "for academic research; clips belong to their makers",
)  # fmt: skip

VIDEO = (
    Benchmark(
        "MMVU", "MMVU, validation", "video", HubDataset("yale-nlp/MMVU", ("validation",)), video.mmvu,
        differs="A named model extracts and judges every answer, thoughts included.",
        judge="eval_mmvu", rows=1000, licence="cc-by-sa-4.0", also=(HubDataset("lmms-eval/MMVU", ("validation",)),),
        unverified="licence from memory",
        clips=ClipFiles(("videos/*",), "about 1 GB of plain files", "cc-by-sa-4.0 as far as known; clips belong to their makers"),
    ),
    Benchmark(
        "MVBench", "MVBench, 20 tasks", "video", HubDataset("OpenGVLab/MVBench", ("train",), _MVBENCH_TASKS, "video"), video.mvbench,
        differs="A system prompt describes how to watch, the answer is begun for the model, and 8 or 16 frames are shown.",
        rows=4000, licence="mit", gated=True,
        unverified="whether start and end on the branch `video`, some of whose clips are cut already, are those of whole clips",
        clips=ClipFiles(
            ("*.mp4", "*.avi", "*.webm", "*.mkv", "*.jpg", "*.png"), "plain files, well over 10 GB",
            "mit for the questions, its terms must be accepted, and clips belong to their makers",
            without=("nturgbd*",),
            by_hand="the 200 clips of fine_grained_pose are NTU RGB+D's, whose owner gives them to those who ask: "
            "https://rose1.ntu.edu.sg/dataset/actionRecognition/ (video/MVBench_videos_ntu.txt of the set lists them); put them into "
            "nturgbd_convert/ of the folder, as .avi or .mp4. Without them their questions are left out and counted",
        ),
    ),
    Benchmark(
        "VMME", "Video-MME without subtitles", "video", HubDataset("lmms-lab/Video-MME", ("test",)), video.videomme,
        differs="The number of frames is each model's own, and only a letter is asked for.",
        rows=2700, also=(HubDataset("lmms-eval/Video-MME", ("test",)),), clips=_VIDEO_MME,
    ),
    Benchmark(
        "VMMES", "Video-MME with subtitles", "video", HubDataset("lmms-lab/Video-MME", ("test",)), video.videomme_subtitles,
        differs="Subtitles of the shown frames only, where a model has few; here all of them, as text before the question.",
        rows=2700, also=(HubDataset("lmms-eval/Video-MME", ("test",)),), clips=_VIDEO_MME,
        unverified="how many subtitles the paper shows",
    ),
    Benchmark(
        "VMMMU", "Video-MMMU", "video",
        HubDataset("lmms-lab/VideoMMMU", ("test",), ("Perception", "Comprehension", "Adaptation")), video.videommmu,
        differs="An answer that cannot be read is drawn at random, the adaptation track has a prompt of its own, and its picture is the "
        "clip's last frame alone.",
        rows=900, gated=True, also=(HubDataset("lmms-eval/VideoMMMU", ("test",), ("Perception", "Comprehension", "Adaptation")),),
        clips=ClipFiles(
            tuple(f"{field}.zip" for field in ("Art", "Business", "Engineering", "Humanities", "Medicine", "Science")),
            "about 13 GB in 6 archives", "its terms must be accepted, and clips belong to their makers",
        ),
        unverified="whether the paper shows the picture of an adaptation question beside the frames, as here, or only as the clip's last",
    ),
)  # fmt: skip


FAMILIES: tuple[Family, ...] = ("vlm", "llm", "video")
PAPER = "paper"

BENCHMARKS: tuple[Benchmark, ...] = (*VISION, *LANGUAGE, *VIDEO)
"""All 31, family by family, in the paper's order."""


def find(name: str) -> Benchmark:
    """The benchmark of this name, in any case. SettingsError with all names if there is none."""
    known = {benchmark.name.lower(): benchmark for benchmark in BENCHMARKS}
    if name.lower() not in known:
        raise SettingsError(
            f"there is no benchmark {name!r}; known: {', '.join(b.name for b in known.values())}, "
            f"and the suites {', '.join((PAPER, *FAMILIES))}; one of your own is a YAML file (my-bench.yaml)"
        )
    return known[name.lower()]


def suite(names: str | Iterable[str], code: bool = True) -> tuple[Benchmark, ...]:
    """The benchmarks of a suite, each once, in the registry's order, then those of the user's own.

    Args:
        names: names of benchmarks, a family (`vlm`, `llm`, `video`), `paper` for all, or a benchmark of one's own
            (`zppo.evals.adapters.own`); a text may join several with commas.
        code: Python of the user's own may be imported.

    Raises:
        SettingsError: a name that is none of these, two benchmarks of one name, code where none is wanted, or no name at all.
        DataError: what a benchmark of one's own says of its rows.
    """
    parts = names.split(",") if isinstance(names, str) else list(names)
    chosen: set[str] = set()
    own: dict[str, Benchmark] = {}
    for part in dict.fromkeys(part.strip() for part in parts):
        if part.lower() == PAPER:
            chosen |= {benchmark.name for benchmark in BENCHMARKS}
        elif part.lower() in FAMILIES:
            chosen |= {benchmark.name for benchmark in BENCHMARKS if benchmark.family == part.lower()}
        elif is_own(part):
            made = own_benchmark(part, code)
            if made.name.lower() in (PAPER, *FAMILIES, *own, *(benchmark.name.lower() for benchmark in BENCHMARKS)):
                raise SettingsError(f"{part}: another benchmark or suite is called {made.name!r}; give it another name")
            own[made.name.lower()] = made
        elif part:
            chosen.add(find(part).name)
    if not chosen and not own:
        raise SettingsError(f"no benchmark is named; give names, {', '.join(FAMILIES)} or {PAPER}")
    return (*(benchmark for benchmark in BENCHMARKS if benchmark.name in chosen), *own.values())


def judge_prompts(given: Iterable[str]) -> dict[str, Path]:
    """JUDGE=PATH of the command line; a benchmark's name stands for its judge. SettingsError where one is neither."""
    names: tuple[str, ...] = (*get_args(Judge), *(mode for modes in MODES.values() for mode in modes))
    judges = {**{b.name.lower(): str(b.judge) for b in BENCHMARKS if b.judge != "judge"}, **{name: name for name in names}}
    result = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path or name.lower() not in judges:
            raise SettingsError(f"--judge-prompt {text!r}: write JUDGE=PATH, with one of {', '.join(names)}, or its benchmark's name")
        result[judges[name.lower()]] = Path(path)
    return result
