"""Jobs that run other jobs one after the other, and the tiny LM that they can do with."""
