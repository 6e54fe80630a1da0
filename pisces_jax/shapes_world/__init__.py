"""The built-in world of coloured shapes: scenes, texts, questions, source, detector and scores."""
