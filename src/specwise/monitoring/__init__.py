"""Whether it stays true: production compared with the study that the decision rests on."""
