"""Where models come from: files and their parsers, quantised blocks, name rules, packing."""
