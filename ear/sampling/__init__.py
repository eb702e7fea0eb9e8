"""From a trained model to images: token sampling with guidance, decoding, editing, and the file of samples."""
