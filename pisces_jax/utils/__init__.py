"""What every layer uses: errors, files, processes, command lines."""
