"""ZPPO in TRL, on a CPU in a few minutes: `GRPOTrainer`'s own use, and a teacher. docs/trl.md says what to change for your model.

python examples/trl_zppo.py [steps]
"""

import sys

from datasets import Dataset

import zppo
from zppo.integrations.trl import ZPPOConfig, ZPPOTrainer

lab = zppo.load_recipe("lab")  # the words of the tiny world; with a real model leave `recipe` out
train, test = ([{"prompt": q.messages[-1].content, "answer": q.gold} for q in questions] for questions in zppo.load_data(lab))
updates = 8  # optimizer steps of a rollout step

trainer = ZPPOTrainer(
    model="lab:unreachable/student",  # "Qwen/Qwen3-0.6B"
    teacher_model="lab:unreachable/teacher",  # "Qwen/Qwen3-8B", here or behind teacher_base_url
    args=ZPPOConfig(
        output_dir="runs/trl-zppo",
        max_steps=updates * int(sys.argv[1] if len(sys.argv) > 1 else 150),
        per_device_train_batch_size=32,  # 8 * 32 rows, 32 questions with 8 completions each, in a rollout step
        steps_per_generation=updates,
        max_completion_length=16,
        learning_rate=5e-4,
        eval_strategy="steps",
        eval_steps=updates * 50,
        per_device_eval_batch_size=256,
        logging_steps=updates,
        save_steps=updates * 50,
        report_to="none",
        use_cpu=True,
        bf16=False,
        recipe={
            "prompts": {name: str(path) for name, path in lab.prompts.items()},
            "teacher": {"rollout": {"max_new_tokens": 16}, "compression": {"max_new_tokens": 24}},
            "zone": {"rho_aug": 0.5, "buffer_capacity": 128},
        },
    ),
    train_dataset=Dataset.from_list(train),
    eval_dataset=Dataset.from_list(test),
)
trainer.train()
print("held out:", trainer.evaluate()["eval_reward"])
