plugins {
    id("com.android.application") version "8.13.0"
    id("org.jetbrains.kotlin.android") version "2.2.20"
}

// The native library of each flavour out of an official AAR, whose Java classes would clash with the binding's.
val library = listOf("cpu", "qnn").associateWith { flavour -> configurations.create("${flavour}Library") { isTransitive = false } }
for ((flavour, aar) in library) {
    val name = flavour.replaceFirstChar(Char::uppercase)
    val unpack = tasks.register<Sync>("unpack$name") {
        from({ zipTree(aar.singleFile) }) { include("jni/arm64-v8a/*.so", "jni/x86_64/*.so") }
        into(layout.buildDirectory.dir("library/$flavour"))
    }
    tasks.matching { it.name.matches(Regex("pre$name\\w+Build")) }.configureEach { dependsOn(unpack) }
}

// The licences; and the manifest without its package, which aapt2 asks for and this plugin refuses, and without a word about native
// libraries, which is different from flavour to flavour.
val prepared = layout.buildDirectory.dir("prepared")
val prepare by tasks.registering(Sync::class) {
    from("../licences") { into("assets/licences") }
    from("src/main/AndroidManifest.xml") {
        filter { it.replace(""" package="dev.lobit.demo"""", "").replace("""android:extractNativeLibs="false"""", "") }
    }
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
    flavorDimensions += "processor"
    productFlavors {
        create("cpu") { dimension = "processor" }
        create("qnn") {
            dimension = "processor"
            ndk.abiFilters += "arm64-v8a"
        }
    }
    sourceSets["main"].apply {
        kotlin.srcDirs("../binding/src/main/kotlin", "../core/src/main/kotlin")
        assets.srcDir(prepared.map { it.dir("assets") })
        manifest.srcFile(prepared.map { it.file("AndroidManifest.xml") }.get())
    }
    for (flavour in library.keys) sourceSets[flavour].jniLibs.srcDir(layout.buildDirectory.dir("library/$flavour/jni"))
    packaging.jniLibs.pickFirsts += "**/libc++_shared.so"
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

androidComponents {
    // The neural processor's own loader reads its libraries (libQnnHtpV…Skel.so) as files: they must be unpacked when the app is installed.
    onVariants(selector().withFlavor("processor" to "qnn")) { variant ->
        variant.packaging.jniLibs.useLegacyPackaging.set(true)
        variant.packaging.jniLibs.useLegacyPackagingFromBundle.set(true)
    }
}

kotlin.jvmToolchain(17)

dependencies {
    "cpuLibrary"("org.pytorch:executorch-android:1.3.0@aar")
    "qnnLibrary"("org.pytorch:executorch-android-qnn:1.5.1@aar")
    "qnnImplementation"("com.qualcomm.qti:qnn-runtime:2.49.0")
    implementation("com.facebook.fbjni:fbjni:0.7.0")
    implementation("com.facebook.soloader:nativeloader:0.10.5")
}

tasks.named("preBuild") { dependsOn(prepare) }
