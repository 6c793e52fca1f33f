plugins {
    id("com.android.application") version "8.13.0"
    id("org.jetbrains.kotlin.android") version "2.2.20"
}

val executorch: Configuration by configurations.creating { isTransitive = false }

// The native library out of the official AAR, whose Java classes would clash with the binding's; the licences; and the manifest without
// its package, which aapt2 asks for and this plugin refuses.
val prepared = layout.buildDirectory.dir("prepared")
val prepare by tasks.registering(Sync::class) {
    from({ zipTree(executorch.singleFile) }) { include("jni/arm64-v8a/*.so", "jni/x86_64/*.so") }
    from("../licences") { into("assets/licences") }
    from("src/main/AndroidManifest.xml") { filter { it.replace(""" package="dev.lobit.demo"""", "") } }
    into(prepared)
}

android {
    namespace = "dev.lobit.demo"
    compileSdk = 34
    defaultConfig {
        applicationId = "dev.lobit.demo"
        minSdk = 26
        targetSdk = 34
        versionCode = 1
        versionName = Regex("__version__ = \"(.+)\"").find(file("../../lobit/__init__.py").readText())!!.groupValues[1]
    }
    sourceSets["main"].apply {
        kotlin.srcDirs("../binding/src/main/kotlin", "../core/src/main/kotlin")
        jniLibs.srcDir(prepared.map { it.dir("jni") })
        assets.srcDir(prepared.map { it.dir("assets") })
        manifest.srcFile(prepared.map { it.file("AndroidManifest.xml") }.get())
    }
    packaging.jniLibs.pickFirsts += "**/libc++_shared.so"
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

kotlin.jvmToolchain(17)

dependencies {
    executorch("org.pytorch:executorch-android:1.3.0@aar")
    implementation("com.facebook.fbjni:fbjni:0.7.0")
    implementation("com.facebook.soloader:nativeloader:0.10.5")
}

tasks.named("preBuild") { dependsOn(prepare) }
