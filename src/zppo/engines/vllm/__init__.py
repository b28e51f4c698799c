"""The student's rollouts by vLLM: in the training process, or in servers on GPUs of their own (docs/vllm.md)."""
