"""Tables, plots and pictures: pure functions of stored runs."""
