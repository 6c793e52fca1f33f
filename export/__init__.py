"""From a converted model to a bundle: the forms of graphs, a package for each target, and the writer."""
