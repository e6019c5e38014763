"""The collection as a graph that Snakemake runs, behind one command: `attention`."""

import sys

# jsonschema would parse a grammar of URIs for a second, in each process; nothing here checks a URI.
sys.modules.setdefault("rfc3987_syntax", None)
