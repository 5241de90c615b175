"""Running the language model: session, generation, prefix reuse, schedules of layers."""
