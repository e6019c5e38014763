"""The map. A module for each concept; a module imports only from those above it.

paths          where things are                       runtime        batches that fit, the cost of passes
labels         which class a label means              images         images in, patches out
models         load, precision, device, refusals      text           sentences in, tokens out
relevance      gradients by the rules of LRP          attention      maps of every head, their gradients
shapley        METHOD 1: matrices, games, solutions   estimators     enumeration, sampling, its limits
faithfulness   erased inputs, curves, scores          baselines      the methods compared with
localisation   maps against known masks               sanity         models with random weights
activations    outputs of every layer, cached         tcav           METHOD 2: CAVs, derivatives, TTCAV
directions     the fits of many CAVs at once          cavs           many CAVs: draws, nulls, files
statistics     every interval, test, correction       data           sentences with labels
concept_world  scenes whose truth is known            plots          figures
results        what a notebook leaves and reads       schematics     both methods in four steps each
explain        a few methods by name, in one call

The workflow that executes the notebooks is in `workflow/`, the pages to read are made by `report/`.
"""
