"""What predicts from features: attention and support vector machines, and how each is fitted."""
