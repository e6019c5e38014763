"""The collection as a graph of notebooks: parameters, checks, execution."""
