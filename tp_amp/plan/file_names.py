"""What the files of a saved model are called."""

WEIGHTS, PLAN, SOURCE = "model.safetensors", "plan.json", "source.json"
