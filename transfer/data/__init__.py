"""From a folder, a zip or a Hub id to lists of files and labels, their splits and their decoded images."""
