"""The collection as a graph that Snakemake runs, behind one command: `attention run`, `sweep`, `status`, `report`."""
