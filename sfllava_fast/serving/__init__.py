"""SlowFast-LLaVA under other people's engines and evaluations."""
