"""A timm model object → a bundle, run, switched and refitted. Needs torch and timm."""

import numpy as np
import timm

import tocom_export

vit = timm.create_model("vit_tiny_patch16_224", num_classes=10)  # yours, trained
bundle = tocom_export.export(
    vit, "example", bank="none", targets=[0, 8, 16], schedules={"fast": [36, 0, 36] + [0] * 9}
)
images = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
print(bundle.engine("fast").run(images).shape)

with tocom_export.EnginePool("example") as pool:
    print(pool.serving.variant.name, pool.run(images).argmax(axis=1))
    pool.switch("r16")  # cheaper from now on
    print(pool.run(images).shape, pool.run(images, variant="r08").shape)
    pool.refit(source=8)  # as if the model had been trained at degree 8
