"""The model around the tokens: checkpoints, prompts, tower, language model and its key/value cache."""
