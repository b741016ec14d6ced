"""From a video and a question to an answer: `SlowFastLlava`, its sessions and streams."""
