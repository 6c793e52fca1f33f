"""From a converted model to a bundle: graph forms, one file per target, the writer."""
