"""From questions to groups: student and teacher rollouts, grading, reformulated prompts."""
