"""What the experiments share: data, figures, flags, files and measurements."""
