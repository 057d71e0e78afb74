"""A transfer-learning project for image classification on the Hugging Face stack; docs/design.md shows its layers."""
