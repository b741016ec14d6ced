"""How the embedded model was trained and is evaluated."""
