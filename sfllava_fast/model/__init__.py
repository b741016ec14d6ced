"""The model around the tokens: checkpoints, prompts, vision tower, language model, KV cache."""
