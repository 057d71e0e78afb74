"""What the model sees of an image: the evaluation transform, the train transform, mixing."""
