"""Your own rows: what they ask, in which words, how documents are cut, and whether a reply gives their answer."""
