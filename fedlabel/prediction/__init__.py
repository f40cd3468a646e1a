"""Using a trained model: the module with its preprocessing, inputs in the form of the data set, predictions, export."""
