"""From a folder, zip, csv or Hub id to lists of files and labels, their splits and their decoded images."""
