"""What differs from backbone to backbone: how one is loaded, sized, shown its images, cut into levels and adapted."""
