"""The paper's analyses of visual redundancy (sections 3, 5.3, 5.4, 7 and 8), each a function of a `Session`."""
