// Opens a prediction, mask or labels over the stack it was made from, in ImageJ or Fiji: Plugins > Macros > Run...
// It asks for two files. The stack gets an overlay, half see-through; the ROI Manager gets the cells' outlines.
//
// Outlines come from the zip that `predict --segment --rois labels.zip --output labels.tif` writes: it must have the
// name of the labels, but for the ending. A probability or a mask without a zip is outlined where it is above a half.
//
// From another macro: runMacro("overlay.ijm", "/home/me/raw.tif|/home/me/labels.tif");
requires("1.52i");
files = split(getArgument(), "|");
if (files.length != 2)
    files = newArray(File.openDialog("The raw stack"), File.openDialog("Its prediction, mask or labels"));

open(files[0]);
raw = getImageID();
open(files[1]);
prediction = getImageID();
title = getTitle();
sections = nSlices;
depth = bitDepth();
selectImage(raw);
if (nSlices != sections)
    exit("The raw stack has " + nSlices + " sections, the prediction " + sections);

selectImage(prediction);
labels = depth == 16;
for (i = 1; depth == 32 && i <= sections; i++) {  // labels of large sections have 32 bits, as probabilities do
    setSlice(i);
    getStatistics(area, mean, min, max);
    if (max > 1) labels = true;
}
if (labels) run("3-3-2 RGB"); else run("Fire");
if (depth == 32 && !labels) setMinAndMax(0, 1); else resetMinAndMax();
for (i = 1; i <= sections; i++) {
    selectImage(prediction);
    setSlice(i);
    selectImage(raw);
    setSlice(i);
    run("Add Image...", "image=[" + title + "] x=0 y=0 opacity=50");
    Overlay.setPosition(i);
}

roiManager("reset");
outlines = substring(files[1], 0, lastIndexOf(files[1], ".")) + ".zip";
if (File.exists(outlines)) {
    selectImage(raw);
    roiManager("open", outlines);
} else if (!labels) {
    selectImage(prediction);
    if (depth == 32) setThreshold(0.5, 1); else setThreshold(128, 255);
    run("Analyze Particles...", "add stack");
    resetThreshold();
}
selectImage(raw);
setSlice(1);
roiManager("show all without labels");
