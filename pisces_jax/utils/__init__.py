"""What every layer uses: errors, atomic files, processes, command lines."""
