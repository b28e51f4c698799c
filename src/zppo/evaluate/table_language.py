"""The 10 language benchmarks."""

from __future__ import annotations

from zppo.evaluate.adapters import choice, maths, talk
from zppo.evaluate.benchmark import Benchmark, Source

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
        name="AIME25",
        title="AIME 2025, I and II",
        family="llm",
        source=Source("opencompass/AIME2025", ("test",), ("AIME2025-I", "AIME2025-II")),
        adapter=maths.aime25,
        differs="A contest has no protocol for models; harnesses differ in how often they sample each of the 30 problems.",
        rows=30,
        licence="mit",
        also=(Source("math-ai/aime25", ("test",), revision="563bb8404243c5f09de6ec262f2db674fe5bce9b"),),
        unverified="configurations and licence of opencompass/AIME2025 are from memory",
    ),
    Benchmark(
        name="AIME26",
        title="AIME 2026",
        family="llm",
        source=Source("MathArena/aime_2026", ("train",)),
        adapter=maths.aime26,
        differs="MathArena samples each problem four times and reports the mean.",
        rows=30,
        also=(Source("math-ai/aime26", ("test",), revision="79037aebdb6580008fb960d17cb21fd3099083e3"),),
        unverified="split and fields (problem_idx, problem, answer) are those of the owner's other contests",
    ),
    Benchmark(
        name="CEval",
        title="C-Eval, validation, 52 subjects",
        family="llm",
        source=Source("ceval/ceval-exam", ("val",), _CEVAL_SUBJECTS),
        adapter=choice.ceval,
        differs="Five worked examples stand before each question, the answer is the likeliest letter, and the test answers are not public.",
        rows=1346,
        licence="cc-by-nc-sa-4.0",
    ),
    Benchmark(
        name="GPQA-D",
        title="GPQA Diamond",
        family="llm",
        source=Source("Idavidrein/gpqa", ("train",), ("gpqa_diamond",)),
        adapter=choice.gpqa,
        differs="Each harness shuffles the options in a way of its own, and many ask every question several times.",
        rows=198,
        licence="cc-by-4.0",
        gated=True,
    ),
    Benchmark(
        name="HLE",
        title="Humanity's Last Exam",
        family="llm",
        source=Source("cais/hle", ("test",), revision="5a81a4c7271a2a2a312b9a690f0c2fde837e4c29"),
        adapter=talk.hle,
        differs="A system prompt asks for explanation, answer and confidence; a named model judges; a calibration error is reported too.",
        judge="eval_hle",
        rows=2500,
        licence="mit",
        gated=True,
        unverified="whether the paper keeps the questions with a picture; they are kept here",
    ),
    Benchmark(
        name="IMO-AB",
        title="IMO-AnswerBench",
        family="llm",
        source=Source("OpenEvals/IMO-AnswerBench", ("train",)),
        adapter=maths.imo_answerbench,
        differs="A named model with a long rubric grades every answer.",
        rows=400,
        licence="cc-by-4.0",
        also=(Source("Hwilner/imo-answerbench", ("train",)),),
        unverified="fields, split and licence are those of the copy Hwilner/imo-answerbench",
    ),
    Benchmark(
        name="MMLU",
        title="MMLU, test",
        family="llm",
        source=Source("cais/mmlu", ("test",), ("all",), "c30699e8356da336a370243923dbaf21066bb9fe"),
        adapter=choice.mmlu,
        differs="Five worked examples stand before each question, and the answer is the likeliest letter.",
        rows=14042,
        licence="mit",
    ),
    Benchmark(
        name="MMLU-Pro",
        title="MMLU-Pro",
        family="llm",
        source=Source("TIGER-Lab/MMLU-Pro", ("test",), revision="527feea0afed1de15a8c115abf7be4c912123315"),
        adapter=choice.mmlu_pro,
        differs="Five worked examples with reasoning stand before each question; an answer that cannot be found is drawn at random.",
        rows=12032,
        licence="mit",
    ),
    Benchmark(
        name="MMLU-Rd",
        title="MMLU-Redux 2.0, 57 subjects",
        family="llm",
        source=Source("edinburgh-dawg/mmlu-redux-2.0", ("test",), _MMLU_SUBJECTS),
        adapter=choice.mmlu_redux,
        differs="Some harnesses keep rows that its annotators found faulty, with the corrected answer; here they are left out.",
        licence="cc-by-4.0",
        unverified="how many of the 5,700 rows have the error type ok; which of them the paper keeps",
    ),
    Benchmark(
        name="MultiCh",
        title="MultiChallenge",
        family="llm",
        source=Source("ScaleAI/MultiChallenge", ("test",)),
        adapter=talk.multichallenge,
        differs="The response is given without any instruction on its form, and a named model answers the target question.",
        judge="eval_multichallenge",
        aggregate="axes",
        rows=266,
        licence="cc-by-4.0",
        also=(Source("nmayorga7/multichallenge", ("train",)),),
        unverified="its paper counts 273 conversations, the card 266",
    ),
)
