"""The 5 video benchmarks."""

from __future__ import annotations

from zppo.evaluate.adapters import video
from zppo.evaluate.benchmark import Benchmark, Source

_MVBENCH_TASKS = tuple(
    """action_antonym action_count action_localization action_prediction action_sequence character_order counterfactual_inference
    egocentric_navigation episodic_reasoning fine_grained_action fine_grained_pose moving_attribute moving_count moving_direction
    object_existence object_interaction object_shuffle scene_transition state_change unexpected_action""".split()
)

VIDEO = (
    Benchmark(
        name="MMVU",
        title="MMVU, validation",
        family="video",
        source=Source("yale-nlp/MMVU", ("validation",)),
        adapter=video.mmvu,
        differs="A named model extracts and judges every answer; here letters are compared, and only open answers are judged.",
        judge="eval_mmvu",
        rows=1000,
        licence="cc-by-sa-4.0",
        also=(Source("lmms-eval/MMVU", ("validation",)),),
        unverified="field of the clip in yale-nlp/MMVU (video; video_path in the copy); licence from memory",
    ),
    Benchmark(
        name="MVBench",
        title="MVBench, 20 tasks",
        family="video",
        source=Source("OpenGVLab/MVBench", ("train",), _MVBENCH_TASKS, "video"),
        adapter=video.mvbench,
        differs="A system prompt describes how to watch, the answer is begun for the model, and 8 or 16 frames are shown.",
        rows=4000,
        licence="mit",
        unverified="whether start and end on the branch `video`, some of whose clips are cut already, are those of whole clips; "
        "NTU clips must be fetched from their owner",
    ),
    Benchmark(
        name="VMME",
        title="Video-MME without subtitles",
        family="video",
        source=Source("lmms-lab/Video-MME", ("test",)),
        adapter=video.videomme,
        differs="The number of frames is each model's own, and only a letter is asked for.",
        rows=2700,
        also=(Source("lmms-eval/Video-MME", ("test",)),),
    ),
    Benchmark(
        name="VMMES",
        title="Video-MME with subtitles",
        family="video",
        source=Source("lmms-lab/Video-MME", ("test",)),
        adapter=video.videomme_subtitles,
        differs="Subtitles of the shown frames only, where a model has few; here all of them, as text before the question.",
        rows=2700,
        also=(Source("lmms-eval/Video-MME", ("test",)),),
        unverified="how many subtitles the paper shows",
    ),
    Benchmark(
        name="VMMMU",
        title="Video-MMMU",
        family="video",
        source=Source("lmms-lab/VideoMMMU", ("test",), ("Perception", "Comprehension", "Adaptation")),
        adapter=video.videommmu,
        differs="An answer that cannot be read is drawn at random, and the adaptation track has a prompt of its own.",
        rows=900,
        also=(Source("lmms-eval/VideoMMMU", ("test",), ("Perception", "Comprehension", "Adaptation")),),
        unverified="whether the picture of an adaptation question, which ends its clip in the copies, is in the frames that are drawn",
    ),
)
