"""The blocks that more than one family is made of: rotary tables, attention, MLP."""
